"""A parameter takes another's place in an optimizer, with what the optimizer remembers of it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peerlm.optim.row_adamw import RowAdamW

_OF_ROWS = ("exp_avg_sq", "moments_step", "weights_step")
"""What RowAdamW keeps of a table as one number for each row."""


def holds(optimizer: torch.optim.Optimizer, parameter: Tensor) -> bool:
    """Whether the optimizer trains this parameter."""
    return any(member is parameter for group in optimizer.param_groups for member in group["params"])


def check_between_steps(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    """Raise a ValueError where a backward pass of this step has updated the parameter already."""
    if "updated_at" in optimizer.state.get(parameter, {}):
        raise ValueError("a backward pass has updated a table and the step is open: call optimizer.step() first")


def replace_parameter(
    optimizer: torch.optim.Optimizer, old: Tensor, new: Tensor, carry: Callable[[Tensor, float], Tensor]
) -> None:
    """Let `optimizer` train `new` from now on in place of `old`.

    Args:
        optimizer: RowAdamW or one of torch's own, between two steps.
        old, new: parameters; `new` may have another shape. Rows of a table are up to date.
        carry: how a tensor that belongs to `old` becomes one that belongs to `new`: of the shape of `old`, or of its
            first dimension alone; the number is that of new entries.

    What is remembered element by element (moments) or row by row is carried. New entries begin as if they had been
    there from the first step and never had a gradient: moments are zero, and steps go on being counted.

    Raises:
        ValueError: the optimizer does not train `old`, or is within a step.
    """
    if not holds(optimizer, old):
        raise ValueError(f"the optimizer does not train this parameter {tuple(old.shape)}; pass the one that does")
    check_between_steps(optimizer, old)
    state: dict[str, Any] = optimizer.state.get(old, {})
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            continue
        of_rows = name in _OF_ROWS and value.shape == old.shape[:1]
        if value.shape == old.shape or of_rows:
            state[name] = carry(value, float(state["step"]) if name == "weights_step" else 0.0)
    optimizer.state.pop(old, None)
    if state:
        optimizer.state[new] = state
    for group in optimizer.param_groups:
        group["params"] = [new if member is old else member for member in group["params"]]
        if isinstance(optimizer, RowAdamW) and group["rows"] and any(member is new for member in group["params"]):
            optimizer.watch(new)
