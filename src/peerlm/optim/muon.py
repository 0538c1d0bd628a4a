"""Muon for the matrices of a model: which it takes, and its step."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, DEFAULT_NS_STEPS, EPS, muon

GROUP = "muon"
"""Name of the group of a parameter that is trained so."""


def takes(parameter: Tensor) -> bool:
    """Whether a weight is a matrix, or a stack of matrices, of more than one row and column."""
    return parameter.ndim in (2, 3) and min(parameter.shape[-2:]) > 1


def muon_step(parameters: Sequence[Tensor], states: Sequence[dict[str, Any]], group: dict[str, Any]) -> None:
    """One step of `torch.optim.Muon` (Jordan 2024), in place, each matrix of a stack on its own.

    The orthogonal update is scaled to the size of AdamW's (0.2 in root mean square; Liu 2025, arXiv 2502.16982), so
    that learning rate and weight decay mean the same.

    Args:
        parameters: with gradients; matrices (A, B) or stacks of these (E, A, B).
        states: of each; "momentum_buffer" is made when first needed.
        group: its "lr", "weight_decay" and "momentum".
    """
    matrices: list[Tensor] = []
    gradients: list[Tensor] = []
    momenta: list[Tensor] = []
    for parameter, state in zip(parameters, states, strict=True):
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        for each, into in ((parameter, matrices), (parameter.grad, gradients), (state["momentum_buffer"], momenta)):
            assert each is not None  # the caller leaves out parameters without a gradient
            into.extend(each.unbind() if each.ndim == 3 else [each])
    muon(
        matrices,
        gradients,
        momenta,
        lr=float(group["lr"]),
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        nesterov=True,
        ns_coefficients=(DEFAULT_A, DEFAULT_B, DEFAULT_C),
        ns_steps=DEFAULT_NS_STEPS,
        eps=EPS,
        adjust_lr_fn="match_rms_adamw",
        has_complex=False,
    )
