"""Tables of the row optimizer in the middle of poisoned memory, where the kernels run."""

import torch

from peerlm.ops.row_updates import RowState

from ...row_tables import tensors
from .guards import assert_guards_kept, between_poison


def placed_on(device: torch.device, table: RowState) -> RowState:
    """A copy on the kernels' device, each tensor in the middle of poisoned memory."""
    copies = {name: between_poison(value.to(device)) for name, value in tensors(table).items()}
    return RowState(**{name: copies.get(name) for name in vars(table)})


def read_back(table: RowState) -> RowState:
    """A copy on the CPU of what `placed_on` has placed, beside which nothing was written."""
    for tensor in tensors(table).values():
        assert_guards_kept(tensor)
    copies = {name: value.cpu() for name, value in tensors(table).items()}
    return RowState(**{name: copies.get(name) for name in vars(table)})
