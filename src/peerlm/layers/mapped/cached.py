"""Tables whose rows stay on the host while a device has those in use: `cache_tables` makes them of a model's tables."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor, nn

from peerlm.layers.mapped.cache import Home, RowCache
from peerlm.layers.mapped.loaded import LoadedRows
from peerlm.layers.mapped.table import MappedTable
from peerlm.layers.table import Index, Replaced, Table, class_of, plain_kind
from peerlm.ops.compiled import never_compiled
from peerlm.ops.row_keeping import keep_at, keeper_of
from peerlm.ops.row_updates import is_watched, look_up
from peerlm.ops.tensors import has_values

if TYPE_CHECKING:
    from typing_extensions import Self

CACHING = ["cuda"]
"""Types of devices that have places for rows of tables in files, and do not read the files themselves."""
_NO_GRADIENTS = "rows that a device caches are mixed with gradients, and read without"
_FETCHED = "the host fetches the rows that a device does not have"
_REASON = f"{_FETCHED}, which a compiled graph cannot do: compile without fullgraph=True"


class CachedTable(Table):
    """A table whose parameter is places on a device, (C, *X), for some of the rows (N, *X), all of which are at home.

    Rows are looked up and trained in their places; whole ranges are read and written at home, which is on the host.
    """

    _cache: RowCache | None
    """None while the table is at home."""

    def _settle_on(self, device: torch.device, places: int) -> None:
        """From now on have so many places on a device; rows are on the CPU, and no optimizer has them."""
        made = RowCache(self._home(), self.num_rows, places, device)
        for name in self._here():
            made.take(name)
        if self.rows.requires_grad:
            self.rows.register_hook(_refuse_dense)
        self._move_to(made)

    def _home(self) -> Home:
        """Of a table that is at home: where its rows are."""
        self.requires_grad_(False)
        self.trained_in_place = False
        return LoadedRows(self._here())

    def _here(self) -> dict[str, Tensor]:
        return {"rows": self.rows.data} | ({} if self.scales is None else {"scales": self.scales})

    def _move_to(self, rows: RowCache) -> None:
        """Let the parameter be the places of a cache."""
        rows.parameter = weakref.ref(self.rows)
        self._become(rows.tensors)
        keep_at(self.rows, rows)
        self._cache = rows

    def _become(self, tensors: dict[str, Tensor]) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            self.rows.data = tensors["rows"]
        if self.scales is not None:
            self.scales = tensors["scales"]

    @contextmanager
    def _at_home(self, *, changes: bool) -> Iterator[None]:
        """Within this context the table is what it would be without a cache; its rows become others if `changes`."""
        rows = self._cache
        assert rows is not None
        rows.settle()
        self._become({name: rows.home.tensor(name) for name in self._here()})
        self._cache = None
        try:
            yield
        finally:
            rows.home = self._home()
            if changes:
                rows.refresh()
            self._move_to(rows)

    # Look-ups

    def mix(
        self, weights_TP: Tensor, ids_TP: Tensor, x_TD: Tensor | None = None, *, activation: str = "identity"
    ) -> Tensor:
        """As of `Table`."""
        mix = super().mix
        return self._in_places(ids_TP, lambda places: mix(weights_TP, places, x_TD, activation=activation))

    def dot(self, x_TD: Tensor, ids_TP: Tensor) -> Tensor:
        """As of `Table`."""
        dot = super().dot
        return self._in_places(ids_TP, lambda places: dot(x_TD, places))

    def gather(self, ids: Tensor, vector: int | None = None) -> Tensor:
        """As of `Table`, without gradients."""
        if torch.is_grad_enabled() and self.requires_grad:
            raise ValueError(f"{_NO_GRADIENTS}: call gather within torch.no_grad()")
        gather = super().gather
        return self._in_places(ids, lambda places: gather(places, vector))

    def _in_places(self, ids: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        return never_compiled(_REASON, self._brought, ids, compute)

    def _brought(self, ids: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        if not has_values(ids):
            raise RuntimeError(
                f"{_FETCHED}, so that ids must have values: no transforms of torch.func, no fake tensors"
            )
        assert self._cache is not None
        places = self._cache.bring(ids, training=self.requires_grad)
        found = compute(places)
        if found.requires_grad:
            self._cache.hold(ids, places, found)
        return found

    def _looked_up(self, ids: Tensor | None, compute: Callable[[Tensor, bool], Tensor]) -> Tensor:
        return super()._looked_up(ids, compute) if self._cache is None else look_up(self.rows, ids, compute)

    # Whole ranges

    def read(self, first: int = 0, count: int | None = None) -> Tensor:
        """As of `Table`, but a copy, on the device, without gradients."""
        if self._cache is None:
            return super().read(first, count)
        if torch.is_grad_enabled() and self.requires_grad:
            raise ValueError(f"{_NO_GRADIENTS}: call read within torch.no_grad()")
        return never_compiled(_REASON, self._read_at_home, first, count)

    def _read_at_home(self, first: int, count: int | None) -> Tensor:
        self.catch_up()
        device = self.device
        with self._at_home(changes=False):
            return super().read(first, count).detach().to(device, copy=True)

    @torch.no_grad()
    def write(self, values: Tensor, first: int = 0, vector: int | None = None) -> None:
        """As of `Table`."""
        if self._cache is None:
            super().write(values, first, vector)
            return
        self.catch_up()
        with self._at_home(changes=True):
            super().write(values.cpu(), first, vector)

    def _fill(self, draw: Callable[[Tensor], object]) -> None:
        with self._at_home(changes=True):
            super()._fill(draw)

    def parts(self) -> list[tuple[nn.Parameter, Index]]:
        """As of `Table`: which row is in each place."""
        return super().parts() if self._cache is None else [(self.rows, self._cache.names)]

    def row_parameters(self) -> list[nn.Parameter]:
        """As of `Table`."""
        return [self.rows]

    def scales_of(self, parameter: Tensor) -> Tensor | None:
        """As of `Table`, in places."""
        return self.scales

    # State dicts and files

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if keep_vars:
            self._refuse("saved with keep_vars=True")
        if self._cache is not None and isinstance(self._cache.home, LoadedRows):  # as they are, beside all passes
            if self.persistent:
                destination.update({f"{prefix}{name}": rows for name, rows in self._cache.home.tensors.items()})
            return
        self.catch_up()
        with self._at_home(changes=False):
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.catch_up()
        with self._at_home(changes=True):
            super()._load_from_state_dict(*arguments)

    # What goes with all rows in memory alone

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(f"a table that a device caches cannot be {what}: do that before cache_tables, on the CPU")

    def resize(self, num_rows: int) -> Replaced:
        """Refused."""
        self._refuse("resized")

    def select(self, ids: Tensor) -> Replaced:
        """Refused."""
        self._refuse("renumbered or cut")

    def convert_rows(self, row_format: str) -> None:
        """Refused."""
        self._refuse("converted")

    def fused_with(self, others: Sequence[Table]) -> Table | None:
        """None: rows at home are not copied."""
        return None

    @property
    def _kind(self) -> type[Any]:
        return plain_kind(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Self":
        for name, tensor in self._here().items():
            found = fn(tensor[:0])
            if found.device != tensor.device or (name == "rows" and found.dtype != tensor.dtype):
                self._refuse(f"moved to {found.device}, or be {found.dtype}")
        return self

    def _replicate_for_data_parallel(self) -> NoReturn:
        self._refuse("replicated by nn.DataParallel")

    def __reduce__(self) -> NoReturn:
        self._refuse("copied or pickled")


class CachedMappedTable(CachedTable, MappedTable):
    """The same of a table in files."""

    def _home(self) -> Home:
        return self.filled_store()

    def _move_to(self, rows: RowCache) -> None:
        assert self._store is not None
        self._store.front = rows
        super()._move_to(rows)

    def _become(self, tensors: dict[str, Tensor]) -> None:
        super()._become(tensors)
        assert self._store is not None
        keep_at(self.rows, self._store)

    def settle(self) -> None:
        """As of `MappedTable`."""
        with self._at_home(changes=False):
            super().settle()

    def whole(self, kind: str) -> Tensor:
        """As of `MappedTable`."""
        with self._at_home(changes=False):
            return super().whole(kind)


def cache_tables(model: nn.Module, device: torch.device | str, places: int) -> list[str]:
    """Let a device have places for that many rows of each table; all rows stay on the host. Returns the tables' paths.

    The rest of the model is moved by `model.to(device)` afterwards, and an optimizer made after that. Tables in files
    are trained as before. Others, such as a loaded model's, are frozen, and moved whole if they have no more rows.

    Args:
        model: on the CPU.
        device: where rows are looked up.
        places: at least the rows that a batch looks up, and in training those of all micro-batches of a step.

    Raises:
        ValueError: a table that is elsewhere, has an optimizer, or shares its rows with another.
    """
    device, found = torch.empty(0, device=device).device, []
    tables = {path: module for path, module in model.named_modules() if isinstance(module, Table)}
    for path, table in tables.items():
        if table.num_rows > places or isinstance(table, MappedTable):
            _check(path, table)
            table.__class__ = _class_for(table)
            cast(CachedTable, table)._settle_on(device, places)
            found.append(path)
    return found


def _check(path: str, table: Table) -> None:
    """Raise ValueError where a device cannot cache this table."""
    ours = MappedTable if isinstance(table, MappedTable) else Table
    if type(table)._looked_up is not ours._looked_up:
        raise ValueError(f"{path} does not have its rows on this host, in one tensor: no device can cache them")
    if table.device.type != "cpu" or is_watched(table.rows) or table.rows.grad is not None:
        raise ValueError(f"{path} is on {table.device}, or in training: cache a model's tables before that")
    if isinstance(table, MappedTable) and (table._store is None or keeper_of(table.rows) is not table._store):
        raise ValueError(f"{path} has the rows of another table, or copies in memory: no device can cache them")


def _class_for(table: Table) -> type[Table]:
    if not isinstance(table, MappedTable):
        return class_of(CachedTable, type(table))
    implementation, kind = type(table).__dict__.get("_made_of", (type(table), Table))
    return class_of(_of_files(implementation), kind)


@cache
def _of_files(implementation: type[Table]) -> type[Table]:
    return type(f"Cached{implementation.__name__}", (CachedMappedTable, implementation), {})


def _refuse_dense(gradient: Tensor | None) -> None:
    """The hook of a cached parameter: only RowAdamW knows that places are not rows."""
    if gradient is not None and not gradient.is_sparse:
        raise RuntimeError(
            "rows that a device caches are trained by RowAdamW alone, by rows, and outside of DistributedDataParallel"
        )
