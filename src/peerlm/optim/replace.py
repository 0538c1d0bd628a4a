"""Replace parameters in an optimizer, carrying its state over."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from peerlm.optim.row_adamw import RowAdamW

_OF_ROWS = ("exp_avg_sq", "moments_step", "weights_step")
"""What RowAdamW keeps of a table as one number for each row, or some."""


def holds(optimizer: torch.optim.Optimizer, parameter: Tensor) -> bool:
    """Whether the optimizer trains this parameter."""
    return any(member is parameter for group in optimizer.param_groups for member in group["params"])


def check_between_steps(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    """Raise a ValueError where a backward pass of this step has updated the parameter already."""
    if "updated_at" in optimizer.state.get(parameter, {}):
        raise ValueError("a backward pass has updated a table and the step is open: call optimizer.step() first")


def replace_parameters(
    optimizer: torch.optim.Optimizer,
    old: Sequence[Tensor],
    new: Sequence[Tensor],
    carry: Callable[[list[Tensor], float], list[Tensor]],
) -> None:
    """Let `optimizer` train `new` from now on in place of `old`, each in the group of its predecessor.

    Args:
        optimizer: RowAdamW or one of torch's own, between two steps.
        old, new: as many parameters; new ones may have other shapes. Rows of a table are up to date.
        carry: how tensors that belong to `old` become those that belong to `new`: all of the shapes of `old`, or all
            of their first dimensions alone; the number is that of new entries.

    What is remembered element by element (moments) or row by row is carried. New entries begin as if they had been
    there from the first step and never had a gradient: moments are zero, and the count of steps continues.

    Raises:
        ValueError: the optimizer does not train `old`, or is within a step.
    """
    for parameter in old:
        if not holds(optimizer, parameter):
            raise ValueError(
                f"the optimizer does not train this parameter {tuple(parameter.shape)}; pass the one that does"
            )
        check_between_steps(optimizer, parameter)
    states: list[dict[str, Any]] = [optimizer.state.pop(parameter, {}) for parameter in old]
    for name in list(states[0]):
        values = [state[name] for state in states]
        if _belongs_to(name, values, old):
            carried = carry(values, float(states[0]["step"]) if name == "weights_step" else 0.0)
            for state, value in zip(states, carried, strict=True):
                state[name] = value
    successors = dict(zip(map(id, old), zip(new, states, strict=True), strict=True))
    for each, state in successors.values():
        if state:
            optimizer.state[each] = state
    for group in optimizer.param_groups:
        taken = [successors[id(member)][0] for member in group["params"] if id(member) in successors]
        group["params"] = [
            successors[id(member)][0] if id(member) in successors else member for member in group["params"]
        ]
        if isinstance(optimizer, RowAdamW) and group["rows"]:
            for parameter in taken:
                optimizer.watch(parameter)


def _belongs_to(name: str, values: list[Any], parameters: Sequence[Tensor]) -> bool:
    """Whether these are of the shapes of the parameters, or have a number for each row of theirs."""
    if not all(isinstance(value, Tensor) and value.ndim for value in values):
        return False
    pairs = list(zip(values, parameters, strict=True))
    return all(value.shape == parameter.shape for value, parameter in pairs) or (
        name in _OF_ROWS and all(value.shape[:1] == parameter.shape[:1] for value, parameter in pairs)
    )
