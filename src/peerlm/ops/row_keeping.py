"""The seam between an optimizer and what keeps a table's rows in files: told before rows change, it has their state.

Readers of rows need nothing of it: rows in a mapped file are a plain tensor.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor

_KEEPER = "_peerlm_row_keeper"
_rows_stay: ContextVar[bool] = ContextVar("rows_stay", default=False)


class RowKeeper(Protocol):
    """What stands at a parameter whose rows are in files."""

    def require(self, size: int) -> None:
        """Raise UserError where new state of so many bytes has no room on the disk."""

    def before_change(self, ids: Tensor | None) -> None:
        """Rows with these ids (int64, any shape, repetitions allowed), or all, and their state are about to change."""

    def parts(self, ids: Tensor) -> Sequence[Tensor]:
        """The ids in pieces of which each is changed at once."""

    def new_state(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Zeros that an optimizer keeps of the rows, the first size being the number of rows."""

    def kept_state(self, name: str) -> Tensor | None:
        """What `new_state` gave before, as it is by now; None where there is none."""


def keep_at(parameter: Tensor, keeper: RowKeeper) -> None:
    """Let `keeper` learn of changes of `parameter` by an optimizer."""
    setattr(parameter, _KEEPER, keeper)


def keeper_of(parameter: Tensor) -> RowKeeper | None:
    """What keeps the rows of this parameter in files; None of rows in memory."""
    return getattr(parameter, _KEEPER, None)


def rows_change(parameter: Tensor, ids: Tensor | None) -> None:
    """Say that an optimizer is about to change rows of `parameter`, or what it keeps of them; None: all rows.

    What the optimizer keeps of them must be there already.
    """
    keeper = keeper_of(parameter)
    if keeper is not None:
        keeper.before_change(ids)


def new_row_state(parameter: Tensor, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros for what an optimizer keeps of each row: in files where the rows are, else on their device."""
    keeper = keeper_of(parameter)
    if keeper is not None:
        return keeper.new_state(name, shape, dtype)
    return torch.zeros(*shape, dtype=dtype, device=parameter.device)


@contextmanager
def rows_stay_in_files() -> Iterator[None]:
    """Within this context rows in files, and what the optimizer keeps of them, are no part of what is saved or loaded.

    It is for checkpoints, which name a state of the files in their place.
    """
    token = _rows_stay.set(True)
    try:
        yield
    finally:
        _rows_stay.reset(token)


def rows_stay() -> bool:
    """Whether this is within `rows_stay_in_files`."""
    return _rows_stay.get()
