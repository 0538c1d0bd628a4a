"""Replace a layer's table or its sub-keys, carrying the optimizer's state over."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from peerlm.growth.indexed import IndexedLayer
from peerlm.layers.table import Replaced
from peerlm.optim.replace import check_between_steps, holds, replace_parameters

Carry = Callable[[Tensor, float], Tensor]
"""From a tensor of the old parameter to that of the new one; the number is what new entries are."""


def check_optimizer(layers: Iterable[IndexedLayer], optimizer: torch.optim.Optimizer | None) -> None:
    """Raise a ValueError where an optimizer does not train these layers, or is within a step."""
    if optimizer is None:
        return
    for layer in layers:
        for parameter in (*layer.table.row_parameters(), layer.index.sub_keys):
            if parameter.requires_grad and not holds(optimizer, parameter):
                raise ValueError("the optimizer does not train this model; pass the one that does, or none")
            check_between_steps(optimizer, parameter)


def swap(module: nn.Module, name: str, value: Tensor, optimizer: torch.optim.Optimizer | None, carry: Carry) -> None:
    """Let `value` be the module's parameter of this name, and the optimizer, where it trained the old one, train it."""
    old = getattr(module, name)
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    setattr(module, name, new)
    hand_over(Replaced(old=[old], new=[new], carry=lambda tensors, value: [carry(tensors[0], value)]), optimizer)


def hand_over(replaced: Replaced, optimizer: torch.optim.Optimizer | None) -> None:
    """Let the optimizer, where it trained the old parameters, train the new ones; the old ones are emptied."""
    if optimizer is not None and all(holds(optimizer, parameter) for parameter in replaced.old):
        replace_parameters(optimizer, replaced.old, replaced.new, replaced.carry)
    for old in replaced.old:
        old.data = old.data.new_empty(0)  # a stale reference fails at once, and the memory is free
        old.grad = None


def padded(dim: int, length: int) -> Carry:
    """Appends new entries along a dimension."""

    def carry(old: Tensor, value: float) -> Tensor:
        shape = list(old.shape)
        shape[dim] = length - old.shape[dim]
        return torch.cat([old, old.new_full(shape, value)], dim=dim)

    return carry
