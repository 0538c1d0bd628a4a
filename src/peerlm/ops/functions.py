"""What every backend computes by name: activations of a neuron, and weightings of a head's scores."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "identity": lambda hidden: hidden,
    "one_plus": lambda hidden: 1 + hidden,
}

WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda scores: scores.softmax(dim=-1),
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
    "none": lambda scores: scores,
}
