"""Some rows of a table on a device, with all that an optimizer keeps of them: which are there, how they come and go.

Rows are in places, in any order. What is looked up comes; what was used longest ago leaves, and is written back if it
has changed. Bytes are copied, so that no bit of a row depends on how often it came.
Shape suffixes: N rows of the table, C places, U distinct rows.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from peerlm.errors import UserError
from peerlm.layers.mapped.staging import Leaving, as_words, gathered, in_words_of, stream_for
from peerlm.ranks import inside_backward

_BYTES_AT_ONCE = 1 << 26


class Home(Protocol):
    """Where all rows are, on the host: a `RowStore`, or `LoadedRows`; functions are those of `RowKeeper`."""

    def tensor(self, name: str) -> Tensor:
        """All rows of "rows", "scales" or a state, (N, ...) on the CPU."""

    def use(self, ids: Tensor, *, training: bool) -> None:
        """These rows are read next."""

    def require(self, size: int) -> None:
        """Raise UserError where so much more has no room."""

    def before_change(self, ids: Tensor | None) -> None:
        """These rows, or all, change next."""

    def new_state(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Zeros for all rows."""

    def put_state(self, name: str, values: Tensor) -> None:
        """Values for all rows."""

    def kept_state(self, name: str) -> Tensor | None:
        """What there is of a name."""


@dataclass(eq=False)
class _Held:
    """Rows that a backward pass will read, and where they are."""

    ids: Tensor
    places: Tensor
    done: bool = False


class RowCache:
    """C places for rows of a table; it is the `ops.row_keeping.RowKeeper` of the parameter that consists of them.

    Args:
        home: where all rows are.
        num_rows: N.
        places: C, at most N of which are made.
        device: where. On the CPU all is as on a GPU, which is how it is tested.

    Attributes:
        tensors: "rows", "scales" and states of the places, each (C, ...), in memory that stays.
        names: (C,) int64, which row is in each place; -1: none.
        asked: how many entries were looked up; `found` says how many of them were here.
        fetched, written: how many rows came, and how many were written back.
    """

    def __init__(self, home: Home, num_rows: int, places: int, device: torch.device) -> None:
        self.home, self.num_rows, self.device = home, num_rows, device
        self.places = max(1, min(places, num_rows))
        self.tensors: dict[str, Tensor] = {}
        self.names = torch.full((self.places,), -1, dtype=torch.int64, device=device)
        self.parameter: weakref.ref[Tensor] | None = None
        self.asked = self.fetched = self.written = 0
        self._found = torch.zeros((), dtype=torch.int64, device=device)
        self._place_of = torch.full((num_rows,), -1, dtype=torch.int32, device=device)
        # One entry more than places: -1 stands for none.
        self._used = torch.full((self.places + 1,), -1, dtype=torch.int64, device=device)
        self._changed = torch.zeros(self.places + 1, dtype=torch.bool, device=device)
        self._now = 0
        self._held: weakref.WeakSet[_Held] = weakref.WeakSet()
        self._stream = stream_for(device)

    def take(self, name: str) -> Tensor:
        """The places' memory for what the home has by this name."""
        whole = self.home.tensor(name)
        if name not in self.tensors:
            self.tensors[name] = torch.zeros(self.places, *whole.shape[1:], dtype=whole.dtype, device=self.device)
        return self.tensors[name]

    @property
    def found(self) -> int:
        """How many entries that were looked up were here; waits for the device."""
        return int(self._found)

    # Look-ups

    @torch.no_grad()
    def bring(self, ids: Tensor, *, training: bool) -> Tensor:
        """Have these rows here, and return their places; ids and places int64, any shape, repetitions allowed.

        The host waits for the device once, and again where rows are missing. Rows whose gradient waits for a step, or
        which a backward pass will read, stay.

        Raises:
            UserError: that takes more places than there are; nothing has come then.
            RuntimeError: a graph is being captured, which cannot ask the host for rows.
        """
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("rows that a device caches are asked for in each step, which no CUDA graph can do")
        flat = ids.reshape(-1)
        places = self._brought(flat, training=training, counted=True)
        return places.view(ids.shape)

    def _brought(self, ids: Tensor, *, training: bool, counted: bool = False) -> Tensor:
        self._begin()
        places = self._place_of[ids].long()
        here = places >= 0
        if counted:
            self.asked += len(ids)
            self._found += here.sum()
        self._used.index_fill_(0, places, self._now)
        if not bool(here.all()):
            self._fetch(ids[~here].unique(), training=training)
            places = self._place_of[ids].long()
            self._used.index_fill_(0, places, self._now)
        return places

    def _begin(self) -> None:
        """Begin to use rows: those that must stay are in use, too."""
        self._now += 1
        if not inside_backward():  # where gradients of rows may be on their way
            for held in [each for each in self._held if each.done]:
                self._held.discard(held)
        for held in list(self._held):
            self._used.index_fill_(0, held.places.reshape(-1), self._now)
        parameter = None if self.parameter is None else self.parameter()
        gradient = None if parameter is None else parameter.grad
        if gradient is not None and gradient.is_sparse:
            self._used.index_fill_(0, gradient._indices()[0], self._now)

    def _in_use(self) -> int:
        return int((self._used[:-1] == self._now).sum())

    def _fetch(self, ids_U: Tensor, *, training: bool) -> None:
        needed = self._in_use() + len(ids_U)
        if needed > self.places:
            raise UserError(
                f"{needed:,} rows of a table are needed at once on {self.device}, and its cache there holds "
                f"{self.places:,}: take {needed:,} or more (tables.device_rows of a recipe, --device-rows of a "
                "command), or fewer tokens at once"
            )
        oldest_U = torch.argsort(self._used[:-1], stable=True)[: len(ids_U)]
        at_once = self._rows_at_once()
        for places, ids in zip(oldest_U.split(at_once), ids_U.split(at_once), strict=True):
            leaving = self._leave(places[self._changed[places]])
            host_ids = ids.cpu()
            self.home.use(host_ids, training=training)
            coming = self._gathered(host_ids)
            leaving()  # before places get other rows: what cannot be written is still here
            before = self.names[places]
            self._place_of.index_fill_(0, before[before >= 0], -1)
            self._put(places, coming)
            self.names.index_copy_(0, places, ids)
            self._place_of.index_copy_(0, ids, places.int())
            self.fetched += len(ids)

    def _gathered(self, ids: Tensor) -> dict[str, Tensor]:
        return {name: gathered(as_words(self.home.tensor(name)), ids, self.device) for name in self.tensors}

    def _put(self, places: Tensor, coming: dict[str, Tensor]) -> None:
        for name, rows in coming.items():
            target = as_words(self.tensors[name])
            target.index_copy_(0, places, in_words_of(rows.to(self.device, non_blocking=True), target))

    def _leave(self, places: Tensor) -> Callable[[], None]:
        """Begin to write these places' rows back; what is returned ends it."""
        if not len(places):
            return lambda: None
        ids = self.names[places].cpu()
        rows = {name: as_words(tensor)[places] for name, tensor in self.tensors.items()}
        leaving = Leaving(rows, self.device, self._stream)

        def write() -> None:
            found = leaving.wait()
            self.home.use(ids, training=True)
            self.home.before_change(ids)
            for name, values in found.items():
                target = as_words(self.home.tensor(name))
                target.index_copy_(0, ids, in_words_of(values, target))
            self._changed.index_fill_(0, places, False)
            self.written += len(ids)

        return write

    def _rows_at_once(self) -> int:
        return max(1, _BYTES_AT_ONCE // max(1, sum(tensor[:1].nbytes for tensor in self.tensors.values())))

    def hold(self, ids: Tensor, places: Tensor, result: Tensor) -> None:
        """Let rows stay until the backward pass of `result`, which was made of them, has read them."""
        held = _Held(ids, places)
        self._held.add(held)

        def before_backward(_: Tensor) -> None:
            if held.done and not torch.equal(self.names[held.places], held.ids):
                raise RuntimeError(
                    "rows of this forward pass have left the device since its first backward pass: repeat the forward "
                    "pass, or allow more rows (tables.device_rows)"
                )
            held.done = not torch.is_grad_enabled()  # a graph of the backward pass reads them again

        result.register_hook(before_backward)

    # Whole tables

    @torch.no_grad()
    def settle(self) -> None:
        """Let the home have all that has changed here."""
        for places in self._changed[:-1].nonzero().flatten().split(self._rows_at_once()):
            self._leave(places)()

    @torch.no_grad()
    def refresh(self) -> None:
        """Let rows that are here be what the home has by now."""
        for places in (self.names >= 0).nonzero().flatten().split(self._rows_at_once()):
            self._put(places, self._gathered(self.names[places].cpu()))
        self._changed.fill_(False)

    # As `RowKeeper`

    def require(self, size: int) -> None:
        """As of `Home`."""
        self.home.require(size)

    def before_change(self, ids: Tensor | None) -> None:
        """These places, of which -1 is none, will be written back; None: all rows are about to change at home."""
        if ids is not None:
            self._changed.index_fill_(0, ids.reshape(-1), True)
            return
        self.settle()
        self.home.before_change(None)

    def parts(self, ids: Tensor) -> Sequence[Tensor]:
        """Places are changed at once."""
        return [ids]

    def new_state(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Zeros for all rows at home, and for the places, whose shape is asked for."""
        self.settle()
        self.home.new_state(name, (self.num_rows, *shape[1:]), dtype)
        self.tensors.pop(name, None)
        return self.take(name)

    def put_state(self, name: str, values: Tensor) -> None:
        """As of `RowKeeper`."""
        self.settle()
        self.home.put_state(name, values)

    def kept_state(self, name: str) -> Tensor | None:
        """The home's, in which all changes are."""
        self.settle()
        return self.home.kept_state(name)

    def state_here(self, name: str) -> Tensor | None:
        """The places', as the home has it."""
        if self.kept_state(name) is None:
            return None
        found = self.take(name)
        self.refresh()
        return found

    def stale(self, now: int) -> Iterator[Tensor | None]:
        """As of `RowKeeper`; rows come in turn."""
        steps = self.kept_state("weights_step")
        if steps is None:
            return
        behind = (steps < now).nonzero().flatten()
        self._begin()
        for ids in behind.split(max(1, self.places - self._in_use())):
            yield self._brought(ids.to(self.device), training=True)
