"""A table whose rows are in a mapped file, as plain as rows in memory to all that reads and trains them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from peerlm.layers.mapped.place import RowPlace
from peerlm.layers.mapped.store import RowStore
from peerlm.layers.row_memory import blocks, chosen_rows, longer_rows
from peerlm.layers.table import Replaced, Table, plain_kind
from peerlm.ops.row_keeping import keep_at, keeper_of, rows_change, rows_stay
from peerlm.ops.row_updates import is_watched
from peerlm.ops.tensors import has_values
from peerlm.ops.watched import raw

if TYPE_CHECKING:
    from typing_extensions import Self

_ELEMENTS_AT_ONCE = 1 << 24


class MappedTable(Table):
    """A table in files of a `RowPlace`; `mapped_in` makes the class of a place.

    Rows stay on the CPU. Copies and pickles are tables in memory, and so are packs of experts.
    """

    place: ClassVar[RowPlace]
    _store: RowStore | None = None

    def _begin(self, num_rows: int, *row_shape: int) -> tuple[int, ...]:
        self._store = self.place.new_store()
        return (num_rows, *row_shape)

    def _empty(self, name: str, *shape: int, dtype: torch.dtype | None, device: torch.device | None = None) -> Tensor:
        if torch.empty(0, device=device).device.type == "meta" or self._store is None:
            return super()._empty(name, *shape, dtype=dtype, device=device)
        return self._store.new(name, shape, dtype or torch.get_default_dtype())

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of `Table`; rows from outside, as loaded ones are, are copied to the file; another table's are shared."""
        store = self._store
        if name == "rows" and param is not None and store is not None and not param.is_meta and not keeper_of(param):
            if not store.holds("rows", param):
                loaded = getattr(param, "_is_hf_initialized", False)
                with torch.no_grad():
                    param = nn.Parameter(store.copy("rows", param.detach()), requires_grad=param.requires_grad)
                param._is_hf_initialized = loaded  # type: ignore[attr-defined]
            keep_at(param, store)
        super().register_parameter(name, param)

    def filled_store(self) -> RowStore:
        """The store, with scales in it that were set from outside."""
        store = self._store
        assert store is not None
        if self.scales is not None and not store.holds("scales", self.scales):
            self.scales = store.copy("scales", self.scales)
        return store

    def settle(self) -> None:
        """Have all in files that a checkpoint names; raise RuntimeError where changes are not logged."""
        self.filled_store()
        if self.requires_grad and not is_watched(self.rows):
            raise RuntimeError("rows in files that are trained go with checkpoints under RowAdamW alone, by rows")

    def _looked_up(self, ids: Tensor | None, compute: Callable[[Tensor, bool], Tensor]) -> Tensor:
        if ids is not None and self._store is not None and not torch.compiler.is_compiling() and has_values(ids):
            self._store.use(ids, training=torch.is_grad_enabled())
        return super()._looked_up(ids, compute)

    def _overwrite(self, first: int, vector: int | None, values: Tensor) -> None:
        if self._store is not None and self.place.resuming:
            raise RuntimeError("a table that is opened to be resumed is written before it is restored")
        rows_change(self.rows, torch.arange(first, first + len(values)))
        super()._overwrite(first, vector, values)

    def _parts_to_draw(self) -> Iterator[slice]:
        if not self.place.resuming:  # or a checkpoint has them
            for part in blocks(self.num_rows, 4 * _ELEMENTS_AT_ONCE, self.row_bytes, multiple=16):
                yield part
                self.place.used((part.stop - part.start) * self.row_bytes)

    @torch.no_grad()
    def resize(self, num_rows: int) -> Replaced:
        """As of `Table`: the files get longer, and no row moves."""
        store = self._in_files("rows")
        if store is None:
            return super().resize(num_rows)
        self.catch_up()
        old = self.rows
        trained = old.requires_grad
        new = nn.Parameter(store.lengthen("rows", num_rows), requires_grad=trained)
        self.rows = new
        if self.scales is not None:
            self.scales = self._changed("scales", self.scales, lambda name: store.lengthen(name, num_rows))
        self.num_rows = num_rows

        def carry(tensors: list[Tensor], value: float) -> list[Tensor]:
            (tensor,) = tensors
            name = store.name_of(tensor)
            longer = longer_rows(tensor, num_rows, value) if name is None else store.lengthen(name, num_rows, value)
            tensor.data = tensor.data.new_empty(0)  # as of a table in memory: it must not be used again
            return [longer]

        return Replaced(old=[old], new=[new], carry=carry)

    @torch.no_grad()
    def select(self, ids: Tensor) -> Replaced:
        """As of `Table`, into other files. Raises RuntimeError where a checkpoint needs the old ones."""
        store = self._in_files("rows")
        if store is None:
            return super().select(ids)
        self.catch_up()
        old = self.rows
        new = nn.Parameter(store.select("rows", ids), requires_grad=old.requires_grad)
        self.rows = new
        if self.scales is not None:
            self.scales = self._changed("scales", self.scales, lambda name: store.select(name, ids))
        self.num_rows = len(ids)

        def carry(tensors: list[Tensor], value: float) -> list[Tensor]:
            (tensor,) = tensors
            name = store.name_of(tensor)
            return [chosen_rows(tensor, ids) if name is None else store.select(name, ids)]

        return Replaced(old=[old], new=[new], carry=carry)

    def link(self, path: Path, kind: str, name: str) -> bool:
        """As of `MappedFile.link`, of the "rows" or "scales"."""
        return self._store is not None and kind in self._store.files and self._store.files[kind].link(path, name)

    def whole(self, kind: str) -> Tensor:
        """The "rows" or "scales" of all rows, on the CPU, as they are."""
        return raw(self.rows) if kind == "rows" else self._buffers[kind]  # type: ignore[return-value]

    def _in_files(self, name: str) -> RowStore | None:
        """The store, where it holds the rows."""
        return self._store if self._store is not None and self._store.holds(name, self.rows) else None

    def _changed(self, name: str, tensor: Tensor, change: Callable[[str], Tensor]) -> Tensor:
        assert self._store is not None
        if not self._store.holds(name, tensor):
            self._store.copy(name, tensor)
        return change(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Self":
        store = self._store

        def applied(tensor: Tensor) -> Tensor:
            name = None if store is None or tensor.is_meta else store.name_of(tensor)
            if store is None or name is None:
                return fn(tensor)
            found = fn(tensor[:0])
            if found.device.type not in ("cpu", "meta"):
                raise ValueError(
                    f"rows in mapped files stay on the CPU, and cannot go to {found.device}: let it have those in use, "
                    "by layers.mapped.cached.cache_tables, before the model is moved"
                )
            if found.device.type == "meta":
                return fn(tensor)
            return tensor if found.dtype == tensor.dtype else store.copy(name, tensor, fn)

        super()._apply(applied, recurse)
        if store is not None and store.holds("rows", self.rows):
            keep_at(self.rows, store)
        return self

    @property
    def _kind(self) -> type[Any]:
        return plain_kind(self)

    def fused_with(self, others: Any) -> Table | None:
        """None: rows in files are not copied."""
        return None

    def _save_to_state_dict(self, *arguments: Any, **options: Any) -> None:
        if not rows_stay():
            super()._save_to_state_dict(*arguments, **options)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        if not rows_stay():
            super()._load_from_state_dict(*arguments)

    def _load_rows(self, *arguments: Any) -> None:
        rows_change(self.rows, None)
        super()._load_rows(*arguments)

    def __reduce__(self) -> Any:
        unpickled, _, state = super().__reduce__()
        return unpickled, (plain_kind(self),), {**state, "_store": None}


def mapped_in(place: RowPlace) -> type[MappedTable]:
    """The class of tables that are kept in a place, for `layers.table.tables_as`."""
    return type("MappedTable", (MappedTable,), {"place": place})


def mapped_tables(model: nn.Module) -> dict[str, MappedTable]:
    """The tables of a model that are in files, by their paths."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MappedTable)}
