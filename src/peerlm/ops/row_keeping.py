"""The seam between an optimizer and what keeps a table's rows in files: told before rows change, it has their state.

Readers of rows need nothing of it: rows in a mapped file are a plain tensor. A parameter may also be places for some of
a table's rows, which come and go (`RowKeeper.names`). The optimizer then trains places, and all it keeps of a row comes
and goes with it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor

_KEEPER = "_peerlm_row_keeper"
_rows_stay: ContextVar[bool] = ContextVar("rows_stay", default=False)


class RowKeeper(Protocol):
    """What stands at a parameter whose rows are in files."""

    @property
    def names(self) -> Tensor | None:
        """Which row of the table is in each place, (C,) int64, -1: none; None: the parameter has all rows in order."""

    @property
    def num_rows(self) -> int:
        """How many rows the table has."""

    def require(self, size: int) -> None:
        """Raise UserError where new state of so many bytes has no room on the disk."""

    def before_change(self, ids: Tensor | None) -> None:
        """Rows with these ids (int64, any shape, repetitions allowed), or all, and their state are about to change.

        Where rows have places these are meant, and -1 is none.
        """

    def parts(self, ids: Tensor) -> Sequence[Tensor]:
        """The ids in pieces of which each is changed at once."""

    def new_state(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Zeros that an optimizer keeps of the rows, the first size being the number of rows."""

    def put_state(self, name: str, values: Tensor) -> None:
        """As `new_state`, with these values of all rows of the table."""

    def kept_state(self, name: str) -> Tensor | None:
        """The state of all rows of the table, as it is by now, to be read or changed; None where there is none."""

    def state_here(self, name: str) -> Tensor | None:
        """What `new_state` gave before, with all changes of `kept_state` in it; None where there is none."""

    def stale(self, now: int) -> Iterator[Tensor | None]:
        """Places of all rows that are not right up to step `now`, some at a time; None: they are where they are."""


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


def names_of(parameter: Tensor) -> Tensor | None:
    """Which row of a table is in each place of `parameter`, as of `RowKeeper.names`; None where these are the same."""
    keeper = keeper_of(parameter)
    return None if keeper is None else keeper.names


def rows_of_table(parameter: Tensor) -> int:
    """How many rows the table has of which `parameter` holds all, or some at a time."""
    keeper = keeper_of(parameter)
    return len(parameter) if keeper is None or keeper.names is None else keeper.num_rows


def stale_rows(parameter: Tensor, now: int) -> Iterator[Tensor | None]:
    """All rows of a table that are not right up to step `now`: as of `RowKeeper.stale`."""
    keeper = keeper_of(parameter)
    return iter([None]) if keeper is None else keeper.stale(now)


def state_of_all(parameter: Tensor, state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """What an optimizer keeps, with all rows of the table in the tensors of these names; to be saved, or changed."""
    keeper = keeper_of(parameter)
    if keeper is None or keeper.names is None:
        return dict(state)
    return dict(state) | {name: keeper.kept_state(name) for name in names if name in state}


def state_changed(parameter: Tensor, names: Sequence[str]) -> None:
    """Say that tensors of `state_of_all` were changed."""
    keeper = keeper_of(parameter)
    if keeper is not None:
        for name in names:
            keeper.state_here(name)


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
