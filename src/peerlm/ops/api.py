"""The public operations: which backend computes them, and what is asked of their arguments.

A backend is one file in this folder and one entry in `_MODULES`. An explicit choice works or explains itself:
it never falls back. Autocast stops here: the dtypes are those of the arguments, because scores rounded to
bfloat16 would choose other experts.
"""

import importlib
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor

from peerlm.ops import reference

_MODULES = {
    "reference": (
        "peerlm.ops.reference",
        "the definition in eager PyTorch, any device, twice differentiable",
    ),
    "bag": ("peerlm.ops.bag", "PyTorch's embedding bags, any device, gathered rows are never materialised"),
}

BACKENDS = ("auto", *_MODULES)


def available_backends() -> dict[str, str]:
    """Each backend by name, and in one phrase what it is; "auto" says what it stands for."""
    return {"auto": "bag"} | {name: description for name, (_, description) in _MODULES.items()}


def check_backend(backend: str) -> None:
    """Raise a ValueError where `backend` is not the name of a backend."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; choose one of {', '.join(BACKENDS)}")


def check_activation(activation: str) -> None:
    """Raise a ValueError where `activation` is not the name of an activation."""
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; choose one of {', '.join(reference.ACTIVATIONS)}")


def _load(backend: str) -> ModuleType:
    check_backend(backend)
    return importlib.import_module(_MODULES["bag" if backend == "auto" else backend][0])


def _without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    device_type = tensor.device.type
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def retrieve(query: Tensor, sub_keys: Tensor, k: int, *, weighting: str = "softmax") -> tuple[Tensor, Tensor]:
    """Retrieve every head's k best experts by product keys; equal to a search over all n * n experts.

    Args:
        query: (T, H, key_dim), any float dtype.
        sub_keys: (2, H or 1, n, key_dim / 2).
        k: experts per head, 1 <= k <= n.
        weighting: "softmax" over each head's k scores, "sigmoid", "relu", or "none" (the raw score).

    Returns:
        weights (T, H, k) in float32 at least, and expert ids (T, H, k) int64 in 0 .. n * n - 1, best first.
        Expert id = i * n + j; experts are ordered by the exact sum of their half scores, equal sums by
        ascending id.
    """
    with _without_autocast(query):
        return reference.retrieve(query, sub_keys, k, weighting)


def mix_experts(
    x: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    down: Tensor,
    up: Tensor,
    gate: Tensor | None = None,
    *,
    activation: str = "gelu",
    backend: str = "auto",
) -> Tensor:
    """Apply each token's retrieved single-neuron experts and sum them by weight (He 2024, equation 1).

    Args:
        x: (T, D).
        weights, expert_ids: (T, P); ids int64 in 0 .. N - 1, repetitions count each time.
        down, up: (N, D). gate: (N, D) for gated experts, or None.
        activation: "gelu", "relu", "silu" or "identity".
        backend: a name in `BACKENDS`.

    Returns:
        (T, D), in the dtype of x.
    """
    with _without_autocast(x):
        return _load(backend).mix_experts(x, weights, expert_ids, down, up, gate, activation)


def mix_values(weights: Tensor, value_ids: Tensor, values: Tensor, *, backend: str = "auto") -> Tensor:
    """Sum each token's retrieved values: weights, value_ids (T, P), values (N, D) -> (T, D)."""
    with _without_autocast(weights):
        return _load(backend).mix_values(weights, value_ids, values)
