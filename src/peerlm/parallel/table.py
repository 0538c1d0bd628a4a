"""Tables of which each rank holds a part, as a plain parameter of its own."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peerlm.layers.table import ROW_FORMATS, Index, Replaced, Table, plain_kind
from peerlm.ops.compiled import never_compiled
from peerlm.ops.row_formats import SCALED_DTYPES, quantise, widened, width
from peerlm.ops.row_shards import RowShard, hold_shard
from peerlm.ops.tensors import has_values
from peerlm.parallel.columns import mix_columns
from peerlm.parallel.exchange import gather_tokens, padded, sum_for_tokens
from peerlm.parallel.layout import Piece, RowLayout
from peerlm.parallel.normal import keyed_normals
from peerlm.parallel.place import Place
from peerlm.ranks import inside_backward

_NUMBERS_AT_ONCE = 1 << 18
_REASON = (
    "ranks exchange the tokens of a sharded table, which a compiled graph cannot do: compile without fullgraph=True"
)
_local_states: ContextVar[bool] = ContextVar("local_states", default=False)


class ShardedTable(Table):
    """A table cut by a `RowLayout`; `sharded_at` makes the class of a mesh.

    Each rank must make the same calls: looking rows up, reading and initialising are done together. Rows are local
    numbers in `rows`, and numbers of the whole table everywhere else.

    Attributes:
        layout: how the table is cut.
        entries: how many entries of tokens were looked up in the rows of this rank in training; int64.
    """

    looked_up_together: ClassVar[bool] = True
    place: ClassVar[Place]
    layout: RowLayout
    entries: Tensor

    def _begin(self, num_rows: int, *row_shape: int) -> tuple[int, ...]:
        *vectors, width = row_shape
        cols = self.place.cols.size
        if width % cols:
            raise ValueError(
                f"a table's {width} columns cannot be cut over cols = {cols} ranks: take a divisor of {width}"
            )
        self.layout = RowLayout(segments=(num_rows,), width=width, rows=self.place.rows.size, cols=cols)
        self.number = self.place.tables
        self.place.tables += 1
        self.register_buffer("entries", torch.zeros((), dtype=torch.int64), persistent=False)
        return (self.layout.num_local(self.place.rows.rank), *vectors, width // cols)

    def _keep(self, rows: Tensor, *, trained: bool = True) -> None:
        super()._keep(rows, trained=trained)
        self._hold()

    def _hold(self) -> None:
        """Say at the parameter which part of the table it is."""
        pieces = self.pieces()
        column, _ = self.layout.columns(self.place.cols.rank)
        shard = RowShard(
            group=self.place.copy,
            firsts=torch.tensor([piece.local for piece in pieces] or [0]),
            shifts=torch.tensor([piece.first - piece.local for piece in pieces] or [0]),
            column=column,
            width=self.layout.width,
            copies=self.place.replica.size,
        )
        hold_shard(self.rows, shard)

    def pieces(self) -> tuple[Piece, ...]:
        """The rows that this rank holds."""
        return self.layout.pieces(self.place.rows.rank)

    def parts(self) -> list[tuple[nn.Parameter, Index]]:
        """As of `Table`; rows by their numbers in the whole table."""
        ranges = [torch.arange(each.first, each.first + each.count, device=self.rows.device) for each in self.pieces()]
        return [(self.rows, torch.cat([torch.empty(0, dtype=torch.int64, device=self.rows.device), *ranges]))]

    def row_parameters(self) -> list[nn.Parameter]:
        """As of `Table`."""
        return [self.rows]

    def scales_of(self, parameter: Tensor) -> Tensor | None:
        """As of `Table`."""
        return self.scales

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows as they are stored."""
        return self.rows.dtype

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.rows.device

    # Look-ups

    def local(self, ids: Tensor) -> Tensor:
        """This rank's numbers of rows, int64, -1 for those of others; ids of any integer dtype and shape."""
        found = torch.full_like(ids, -1, dtype=torch.int64)
        for piece in self.pieces():
            place = ids - piece.first
            found = torch.where((place >= 0) & (place < piece.count), place + piece.local, found)
        return found

    def mix(
        self, weights_TP: Tensor, ids_TP: Tensor, x_TD: Tensor | None = None, *, activation: str = "identity"
    ) -> Tensor:
        """As of `Table`; ranks may have different numbers of tokens."""
        return never_compiled(_REASON, self._mix, weights_TP, ids_TP, x_TD, activation)

    def _mix(self, weights_TP: Tensor, ids_TP: Tensor, x_TD: Tensor | None, activation: str) -> Tensor:
        tokens = self._most(ids_TP)
        weights = padded(weights_TP.float() if weights_TP.dtype.itemsize < 4 else weights_TP, tokens)
        x = None if x_TD is None else padded(x_TD, tokens)
        ids = self._on_all(ids_TP, tokens)
        if self.place.cols.size > 1:
            return mix_columns(self, weights, ids, x, activation)[: len(ids_TP)]
        given = (weights,) if x is None else (weights, x)
        weights_all, *x_all = gather_tokens(self.place, *given)
        partial = super().mix(weights_all, ids, *x_all, activation=activation)
        return sum_for_tokens(self.place, partial)[: len(ids_TP)]

    def dot(self, x_TD: Tensor, ids_TP: Tensor) -> Tensor:
        """As of `Table`; ranks may have different numbers of tokens."""
        return never_compiled(_REASON, self._dot, x_TD, ids_TP)

    def _dot(self, x_TD: Tensor, ids_TP: Tensor) -> Tensor:
        tokens = self._most(ids_TP)
        ids = self._on_all(ids_TP, tokens)
        x = padded(x_TD, tokens)
        if self.place.cols.size > 1:
            return mix_columns(self, None, ids, x, "identity")[: len(ids_TP)]
        (x_all,) = gather_tokens(self.place, x)
        return sum_for_tokens(self.place, super().dot(x_all, ids))[: len(ids_TP)]

    def gather(self, ids: Tensor, vector: int | None = None) -> Tensor:
        """As of `Table`, without gradients; each rank must call it."""
        if torch.is_grad_enabled() and self.requires_grad:
            raise ValueError(
                "rows of a sharded table are gathered without gradients: call gather within torch.no_grad()"
            )
        return never_compiled(_REASON, self._gather, ids, vector)

    def _gather(self, ids: Tensor, vector: int | None) -> Tensor:
        count = self.place.all.most(ids.numel())
        local = self._on_all(ids.reshape(-1), count, counted=False)
        mine = local >= 0
        *vectors, whole = self.row_shape
        width = whole // self.place.cols.size
        size = (len(local), *vectors, width) if vector is None else (len(local), width)
        found = torch.zeros(size, dtype=torch.promote_types(self._wide_dtype, torch.float32), device=self.device)
        found[mine] = super().gather(local[mine], vector).to(found.dtype)
        found = (
            self.place.cols.reduce(self.place.rows.reduce(found)) if self.place.cols.size == 1 else self._joined(found)
        )
        return found[: ids.numel()].unflatten(0, ids.shape)

    def _joined(self, found: Tensor) -> Tensor:
        """Of rows' columns for all tokens those of this rank's tokens, with all columns."""
        own = self.place.cols.swap(self.place.rows.reduce(found))
        count = len(own) // self.place.cols.size
        return torch.cat(own.split(count), dim=-1)

    @property
    def _wide_dtype(self) -> torch.dtype:
        return self.rows.dtype if self.scales is None else self.scales.dtype

    def _most(self, ids_TP: Tensor) -> int:
        """How many tokens the rank with most has."""
        return self.place.all.most(len(ids_TP)) if has_values(ids_TP) else len(ids_TP)

    def _on_all(self, ids: Tensor, tokens: int, *, counted: bool = True) -> Tensor:
        """Of ids (t, ...) of all ranks' tokens this rank's numbers of rows."""
        narrow = torch.int32 if self.num_rows < 2**31 else torch.int64
        given = padded(ids.to(narrow), tokens, -1)
        local = self.local(self.place.rows.gather(self.place.cols.gather(given)))
        if counted and self.training and not inside_backward():
            self.entries += (local >= 0).sum()
        return local

    # Whole ranges

    def read(self, first: int = 0, count: int | None = None) -> Tensor:
        """As of `Table`, but a copy; each rank must call it, and gets all of the rows that it asks for."""
        if torch.is_grad_enabled() and self.requires_grad:
            raise ValueError("rows of a sharded table are read without gradients: call read within torch.no_grad()")
        return never_compiled(_REASON, self._read, first, count)

    def _read(self, first: int, count: int | None) -> Tensor:
        self.catch_up()
        count = self.num_rows - first if count is None else min(count, self.num_rows - first)
        out = torch.zeros(count, *self.row_shape, dtype=self._wide_dtype, device=self.device)
        column, width = self.layout.columns(self.place.cols.rank)
        for begin, local, many in self._here(first, count):
            rows = self.rows.detach()[local : local + many]
            if self.scales is not None:
                rows = widened(rows, self.scales[local : local + many])
            out[begin : begin + many, ..., column : column + width] = rows
        if self.place.world > 1:
            torch.distributed.all_reduce(out, group=self.place.copy)
        return out

    def _here(self, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Of rows first, first + 1, ... those of this rank: place among these, this rank's number, how many."""
        for piece in self.pieces():
            begin, end = max(first, piece.first), min(first + count, piece.first + piece.count)
            if begin < end:
                yield begin - first, begin - piece.first + piece.local, end - begin

    @torch.no_grad()
    def write(self, values: Tensor, first: int = 0, vector: int | None = None) -> None:
        """As of `Table`; each rank must give the same values, of which it takes its own."""
        self.catch_up()
        scales = None
        if self.scales is not None:
            values, scales = quantise(values, self.dtype)
        column, width = self.layout.columns(self.place.cols.rank)
        for begin, local, many in self._here(first, len(values)):
            own = values[begin : begin + many, ..., column : column + width]
            target = self.rows[local : local + many]
            (target if vector is None else target[:, vector]).copy_(own)
            if scales is not None:
                assert self.scales is not None
                target = self.scales[local : local + many]
                (target if vector is None else target[:, vector]).copy_(scales[begin : begin + many])

    def _fill(self, draw: Callable[[Tensor], object]) -> None:
        raise ValueError(
            "a sharded table is nowhere whole: initialise it by fill_normal, or by write, some rows at a time"
        )

    @torch.no_grad()
    def fill_normal(self, std: float, factors: Mapping[int, float] | None = None) -> None:
        """As of `Table`, by numbers that are functions of the place's seed, table, row and column; see `normal.py`."""
        if not has_values(self.rows) or getattr(self.rows, "_is_hf_initialized", False):
            return
        scale = torch.full(self.row_shape[:-1], std, dtype=torch.float64)
        for vector, factor in (factors or {}).items():
            scale[vector] *= factor
        if self.scales is not None:
            column, width = 0, self.layout.width  # scales are of whole vectors
        else:
            column, width = self.layout.columns(self.place.cols.rank)
        vectors = scale.flatten()
        columns = torch.cat([v * self.layout.width + torch.arange(column, column + width) for v in range(len(vectors))])
        at_once = max(1, _NUMBERS_AT_ONCE // len(columns))
        seed, columns, device = self.place.seed, columns.to(self.device), self.device
        for piece in self.pieces():
            for start in range(0, piece.count, at_once):
                begin = piece.first + start
                rows = torch.arange(begin, begin + min(at_once, piece.count - start), device=device)
                drawn = keyed_normals(seed, self.number, rows, columns).view(len(rows), *self.row_shape[:-1], width)
                drawn = (drawn * scale.to(device)[..., None]).to(self._wide_dtype)
                if self.scales is not None:
                    self.write(drawn, begin)
                else:
                    local = begin - piece.first + piece.local
                    self.rows[local : local + len(rows)].copy_(drawn)

    # Shapes and formats

    @torch.no_grad()
    def resize(self, num_rows: int) -> Replaced:
        """As of `Table`: the new rows are one more segment of the layout, and no row moves."""
        layout = self.layout.grown(num_rows)
        replaced = super().resize(layout.num_local(self.place.rows.rank))
        self.num_rows, self.layout = num_rows, layout
        self._hold()
        return replaced

    def select(self, ids: Tensor) -> Replaced:
        """Refused: rows would move between ranks."""
        raise ValueError("rows of a sharded table cannot be renumbered or removed: do that before it is sharded")

    def _held_shape(self) -> tuple[int, ...]:
        rows = self.rows
        return (*rows.shape[:-1], width(rows))

    def _held(self, part: slice) -> Tensor:
        rows = self.rows.detach()[part]
        return rows if self.scales is None else widened(rows, self.scales[part])

    @torch.no_grad()
    def convert_rows(self, row_format: str) -> None:
        """As of `Table`, each rank its part."""
        if ROW_FORMATS.get(row_format) in SCALED_DTYPES and self.place.cols.size > 1:
            raise ValueError(f"{row_format} rows have scales of whole vectors, which cols > 1 cut: shard by rows alone")
        super().convert_rows(row_format)

    def like(self, rows: Tensor, *, trained: bool) -> Table:
        """A whole table of these rows on each rank, frozen."""
        if trained:
            raise ValueError(
                "a pack cannot be trained beside sharded experts: train it on a model that is not sharded, then load it"
            )
        return super().like(rows, trained=False)

    @property
    def _kind(self) -> type[Any]:
        return plain_kind(self)

    def fused_with(self, others: Any) -> Table | None:
        """None: the others are whole."""
        return None

    # State dicts and copies

    def _save_to_state_dict(self, *arguments: Any, **options: Any) -> None:
        if not _local_states.get():
            raise RuntimeError(
                "a state dict would hold this rank's part of a sharded table under the name of the whole: save the "
                "model by peerlm.parallel, or within peerlm.parallel.local_states()"
            )
        super()._save_to_state_dict(*arguments, **options)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """As of `Table`: the rows of the whole table, or within `local_states` those of this rank."""
        name = prefix + "rows"
        if not _local_states.get() and name in state_dict:
            whole = state_dict.pop(name)
            if whole.shape != (self.num_rows, *self.row_shape):
                arguments[4].append(
                    f"size mismatch for {name}: copying a param with shape {tuple(whole.shape)} from checkpoint, the "
                    f"shape in current model is {(self.num_rows, *self.row_shape)}."
                )
                return
            scales = state_dict.pop(prefix + "scales", None)
            self.write_saved(whole, scales)
            return
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._hold()


def sharded_at(place: Place) -> type[ShardedTable]:
    """The class of tables that are cut over the mesh of a place."""
    return type("ShardedTable", (ShardedTable,), {"place": place})


def sharded_tables(model: nn.Module) -> dict[str, ShardedTable]:
    """The sharded tables of a model by their paths."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ShardedTable)}


@contextmanager
def local_states() -> Iterator[None]:
    """Within this context state dicts have of sharded tables this rank's part, under the name of the whole."""
    token = _local_states.set(True)
    try:
        yield
    finally:
        _local_states.reset(token)
