"""A pool's table or sub-keys give way to others that carry on from them, in the optimizer too."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from peerlm.growth.indexed import Pool
from peerlm.layers import ExpertTable
from peerlm.layers.row_table import empty_rows
from peerlm.ops import api
from peerlm.ops.rows import prepare_rows
from peerlm.optim.replace import check_between_steps, holds, replace_parameter

Carry = Callable[[Tensor, float], Tensor]
"""From a tensor of the old parameter to that of the new one; the number is what new entries are."""


def check_optimizer(pools: Iterable[Pool], optimizer: torch.optim.Optimizer | None) -> None:
    """Raise a ValueError where an optimizer does not train these pools, or is within a step."""
    if optimizer is None:
        return
    for pool in pools:
        for parameter in (pool.table, pool.keys.sub_keys):
            if parameter.requires_grad and not holds(optimizer, parameter):
                raise ValueError("the optimizer does not train this model; pass the one that does, or none")
            check_between_steps(optimizer, parameter)


def swap(module: nn.Module, name: str, value: Tensor, optimizer: torch.optim.Optimizer | None, carry: Carry) -> None:
    """Let `value` be the module's parameter of this name, and the optimizer, where it trained the old one, train it."""
    old = getattr(module, name)
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    setattr(module, name, new)
    if optimizer is not None and holds(optimizer, old):
        replace_parameter(optimizer, old, new, carry)
    old.data = old.data.new_empty(0)  # who still holds it shall notice, and its memory is not needed
    old.grad = None


def take_rows(pool: Pool, ids: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    """Let a pool have these rows of its table, in this order; ids (N',) int64."""
    carry = chosen(0, ids)
    prepare_rows(pool.table, None)
    if isinstance(pool.owner, ExpertTable) and pool.owner.scales is not None:
        pool.owner.scales = carry(pool.owner.scales, 0.0)
    swap(pool.owner, pool.owner.rows_name, carry(pool.table, 0.0), optimizer, carry)


def padded(dim: int, length: int) -> Carry:
    """Appends new entries along a dimension; along the first, old tensors are left empty."""

    def carry(old: Tensor, value: float) -> Tensor:
        if dim == 0:
            longer = appended(old, length)
            longer[len(old) :] = value
            old.data = old.data.new_empty(0)  # as of a parameter, in `swap`: its memory may be gone
            return longer
        shape = list(old.shape)
        shape[dim] = length - old.shape[dim]
        return torch.cat([old, old.new_full(shape, value)], dim=dim)

    return carry


def chosen(dim: int, ids: Tensor) -> Carry:
    """Takes these entries along a dimension, in this order."""

    def carry(old: Tensor, value: float) -> Tensor:
        if dim or old.device.type != "cpu":
            return old.index_select(dim, ids.to(old.device))
        return torch.index_select(old, 0, ids, out=empty_rows(len(ids), *old.shape[1:], dtype=old.dtype))

    return carry


def appended(rows: Tensor, length: int) -> Tensor:
    """Room for `length` rows, the first of which are these; the others are not initialised.

    Where nobody else has the memory of `rows`, it is given back while they move (`ops.native.move_to_start`).
    """
    longer = empty_rows(length, *rows.shape[1:], dtype=rows.dtype)
    if longer.device != rows.device:
        longer = torch.empty_like(longer, device=rows.device)
    if not api.move_to_start(rows, longer):
        longer[: len(rows)] = rows
    return longer
