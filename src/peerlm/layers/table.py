"""The table of rows: all that reads, writes, resizes or trains rows of experts and memories goes through this class.

Who keeps rows elsewhere (cut over ranks, in a mapped file, in other formats) writes a subclass: `tables_as` has every
table of a model made of it. Shape suffixes: N rows, X a row's shape, T tokens, P rows per token, D width.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from peerlm.layers.row_memory import blocks, chosen_rows, empty_rows, longer_rows
from peerlm.ops import api
from peerlm.ops.row_formats import (
    EIGHT_BIT_DTYPES,
    GROUP,
    INT4,
    SCALED_DTYPES,
    movable,
    quantise,
    rows_at,
    scales_shape,
    stored_shape,
    widened,
)
from peerlm.ops.row_updates import keep_rows, look_up, outside_graphs, prepare_rows

if TYPE_CHECKING:
    from typing_extensions import Self

_WIDE_BYTES = 1 << 25
"""How much of a table is widened at once while it changes its format."""
ROW_FORMATS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "int4": INT4,
}

Index = slice | Tensor
"""What picks the entries of some rows from a tensor with one entry per row."""


@dataclass(frozen=True, kw_only=True)
class Replaced:
    """Parameters of a table that others have taken the place of; the old ones must not be read any more."""

    old: list[nn.Parameter]
    new: list[nn.Parameter]
    carry: Callable[[list[Tensor], float], list[Tensor]]
    """From tensors of the old parameters (of their shapes, or of their first dimensions) to those of the new ones; the
    number fills entries of new rows. The given tensors may be emptied."""


class Table(nn.Module):
    """N rows of one shape, of which tokens look some up.

    Args:
        num_rows: N.
        row_shape: X: (D,) for vectors, (2, D) or (3, D) for the vectors u, v and, if gated, g of single neurons.
        backend: a name in `peerlm.ops.api.BACKENDS`.
        row_format: "float32" (torch's default dtype where that is another), "bfloat16", or, with a scale for each
            vector, "int8" or "float8_e4m3fn"; rows with scales are trained in place alone (`train_in_place`).

    Rows are not initialised: see `fill`.

    Attributes:
        rows: (N, *X), the parameter; subclasses may have others, which `parts` names.
        persistent: whether rows are part of state dicts.
        users: how many layers look rows up in this table.
        scales: float32, what each vector of 8-bit rows is multiplied by, (N, *X) without its last dimension, or each
            group of 32 numbers of int4 rows, with D / 32 there; or None.

    Raises:
        ValueError: an unknown backend or format.
    """

    parameter_roles: ClassVar[dict[str, str]] = {"rows": "table"}
    looked_up_together: ClassVar[bool] = False
    """Whether ranks look rows up together, so that none may leave a look-up out; an id of -1 asks for no row."""
    rows: nn.Parameter
    scales: Tensor | None
    users: int = 1

    def __new__(cls, *arguments: Any, **settings: Any) -> "Table":
        """A table of this class, in `tables_as` also of that subclass."""
        implementation = _implementation.get()
        return super().__new__(cls if implementation is None else class_of(implementation, cls))

    def __init__(self, num_rows: int, *row_shape: int, backend: str = "auto", row_format: str = "float32"):
        super().__init__()
        api.check_backend(backend)
        dtype = row_dtype(row_format)
        self.num_rows = num_rows
        self.row_shape = row_shape
        self.backend = backend
        self.persistent = True
        self.watched = False
        self.trained_in_place = False
        held = self._begin(num_rows, *row_shape)
        self._keep(self._empty("rows", *stored_shape(held, dtype), dtype=None if dtype == torch.float32 else dtype))
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        scales = self._empty("scales", *scales_shape(held, dtype), dtype=wide) if dtype in SCALED_DTYPES else None
        self.register_buffer("scales", scales)
        keep_rows(self)

    # What a subclass that keeps rows elsewhere replaces.

    def _begin(self, num_rows: int, *row_shape: int) -> tuple[int, ...]:
        """How much of a new table (N, *X) is held here: the shape that `_keep` gets."""
        return (num_rows, *row_shape)

    def _empty(self, name: str, *shape: int, dtype: torch.dtype | None, device: torch.device | None = None) -> Tensor:
        """Memory for "rows" or "scales" that are written next; dtype and device are torch's defaults where None."""
        return empty_rows(*shape, dtype=dtype, device=device)

    def _keep(self, rows: Tensor, *, trained: bool = True) -> None:
        """Take these rows (N, *X) as the parameters."""
        self.rows = nn.Parameter(rows, requires_grad=trained and rows.dtype not in SCALED_DTYPES)

    def parts(self) -> list[tuple[nn.Parameter, Index]]:
        """The parameters that hold rows, and which rows each of them holds."""
        return [(self.rows, slice(None))]

    def _looked_up(self, ids: Tensor | None, compute: Callable[[Tensor, bool], Tensor]) -> Tensor:
        """What `compute` makes of the table (N, *X), of which it reads the rows `ids` (None: any).

        It is also told whether the gradient of the table should be a sparse tensor.
        """
        return look_up(self.rows, ids, compute)

    def _overwrite(self, first: int, vector: int | None, values: Tensor) -> None:
        """Store values in the dtype of the rows in rows first, first + 1, ..., or in one vector of each."""
        target = self.rows[first : first + len(values)]
        (target if vector is None else target[:, vector]).copy_(values)

    def _replace(self, change: Callable[[Tensor, float], Tensor]) -> Replaced:
        """Let what `change` makes of the rows take their place."""
        old = self.rows
        new = nn.Parameter(change(old, 0.0), requires_grad=old.requires_grad)
        self.rows = new
        return Replaced(old=[old], new=[new], carry=lambda tensors, value: [change(tensors[0], value)])

    # Everything else is made of these.

    @property
    def row_format(self) -> str:
        """A name in `ROW_FORMATS`, or of another dtype that the module was cast to."""
        return "int4" if self.dtype == INT4 else str(self.dtype).removeprefix("torch.")

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows as they are stored."""
        return self.parts()[0][0].dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one row as it is stored, with its scales."""
        scales = 0
        if self.scales is not None:
            scales = self.scales.element_size() * math.prod(scales_shape(self.row_shape, self.dtype))
        return self.dtype.itemsize * math.prod(stored_shape(self.row_shape, self.dtype)) + scales

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.parts()[0][0].device

    @property
    def has_gradients(self) -> bool:
        """Whether rows have a format that can have a gradient; of others those of 8 bits are trained in place."""
        return self.dtype not in SCALED_DTYPES

    @property
    def requires_grad(self) -> bool:
        """Whether rows are trained now."""
        return self.trained_in_place or any(parameter.requires_grad for parameter, _ in self.parts())

    def train_in_place(self, trained: bool = True) -> None:
        """Let rows of 8 bits be trained, or no longer: by `optim.RowAdamW(fused=True)`, to be made afterwards.

        They have no gradient: the optimizer changes them, and their scales, in the backward pass. So
        `model.requires_grad_(False)` does not reach them, and this does.

        Raises:
            ValueError: rows of another format are to be trained, which `requires_grad_` is for; none is for int4.
        """
        if trained and self.dtype == INT4:
            raise ValueError("rows in int4 are not trained: convert them to another format")
        if trained and self.scales is None:
            raise ValueError(f"rows in {self.row_format} have gradients: use requires_grad_({trained})")
        self.trained_in_place = trained

    def scales_of(self, parameter: Tensor) -> Tensor | None:
        """The scales of one of the parameters that hold rows, a view; None of rows without scales."""
        part = next(part for each, part in self.parts() if each is parameter)
        if self.scales is None:
            return None
        if not isinstance(part, slice):
            raise ValueError("rows of 8 bits that lie scattered over parameters are not trained: use bfloat16 rows")
        return self.scales[part]

    def row_parameters(self) -> list[nn.Parameter]:
        """The parameters that hold rows."""
        return [parameter for parameter, _ in self.parts()]

    def mix(
        self, weights_TP: Tensor, ids_TP: Tensor, x_TD: Tensor | None = None, *, activation: str = "identity"
    ) -> Tensor:
        """The weighted sum of each token's rows, (T, D).

        With rows (D,) that is the sum of weight * row. With rows (2 or 3, D) it is that of weight * act(u . x) v, or
        weight * (u . x) * act(g . x) v (He 2024, equation 1), in the dtype of x (T, D).

        weights_TP, ids_TP: (T, P); ids int64 in 0 .. N - 1. activation: as of `peerlm.ops.api.mix_experts`.
        """

        def compute(rows: Tensor, row_gradients: bool) -> Tensor:
            if x_TD is None:
                return api.mix_values(weights_TP, ids_TP, rows, backend=self.backend, row_gradients=row_gradients)
            weights = weights_TP
            if self.scales is not None:
                row_gradients = self._updates_rows(row_gradients)
                if row_gradients and not (x_TD.requires_grad or weights.requires_grad):
                    weights = weights.detach().requires_grad_()  # what the backward pass comes by
            return api.mix_experts(
                x_TD,
                weights,
                ids_TP,
                rows,
                self.scales,
                activation=activation,
                backend=self.backend,
                row_gradients=row_gradients,
            )

        return self._look_up(ids_TP, compute)

    def _updates_rows(self, row_gradients: bool) -> bool:
        """Whether the backward pass of a look-up will update rows of 8 bits.

        Raises RuntimeError where nobody would, though they are to be trained.
        """
        if not (self.trained_in_place and torch.is_grad_enabled()):
            return False
        if self.training and not row_gradients:
            raise RuntimeError(
                f"rows in {self.row_format} are trained by RowAdamW(fused=True) alone, outside of "
                "DistributedDataParallel: make one, or call train_in_place(False)"
            )
        return row_gradients

    def dot(self, x_TD: Tensor, ids_TP: Tensor) -> Tensor:
        """Inner products of each token with its rows of shape (D,): x (T, D), ids (T, P) int64 -> (T, P)."""

        def compute(rows: Tensor, row_gradients: bool) -> Tensor:
            return api.dot_values(x_TD, ids_TP, rows, backend=self.backend, row_gradients=row_gradients)

        return self._look_up(ids_TP, compute)

    def gather(self, ids: Tensor, vector: int | None = None) -> Tensor:
        """Rows as they count, in float32 at least: ids (...) int64 -> (..., *X); one vector of each: (..., D)."""

        def compute(rows: Tensor, row_gradients: bool) -> Tensor:
            chosen = rows if vector is None else rows[:, vector]
            found = rows_at(chosen, ids)
            if self.scales is None:
                return found.to(torch.promote_types(found.dtype, torch.float32))
            scales = self.scales[ids] if vector is None else self.scales[ids, vector]
            return widened(found, scales)

        return self._look_up(ids, compute)

    def _look_up(self, ids: Tensor | None, compute: Callable[[Tensor, bool], Tensor]) -> Tensor:
        return outside_graphs(self._looked_up, ids, compute) if self.watched else self._looked_up(ids, compute)

    def read(self, first: int = 0, count: int | None = None) -> Tensor:
        """Rows first, first + 1, ..., all by default: (count, *X), where they can be a view in the dtype of the rows.

        Rows with scales are float32, multiplied by these.
        """
        part = slice(first, None if count is None else first + count)

        def compute(rows: Tensor, row_gradients: bool) -> Tensor:
            return rows[part] if self.scales is None else widened(rows[part], self.scales[part])

        return self._look_up(None, compute)

    @torch.no_grad()
    def write(self, values: Tensor, first: int = 0, vector: int | None = None) -> None:
        """Let rows first, first + 1, ... be these values (count, *X), or one vector of each (count, D).

        Values of any float dtype and device are stored in the format of the table.
        """
        self.catch_up()
        if self.scales is not None:
            values, scales = quantise(values, self.dtype)
            target = self.scales[first : first + len(values)]
            (target if vector is None else target[:, vector]).copy_(scales)
        self._overwrite(first, vector, values)

    @torch.no_grad()
    def fill(self, draw: Callable[[Tensor], object]) -> None:
        """Let `draw` write all rows, a float tensor (N, *X), unless transformers has marked them as loaded."""
        if any(each.is_meta or getattr(each, "_is_hf_initialized", False) for each in self.row_parameters()):
            return
        self._fill(draw)

    @torch.no_grad()
    def fill_normal(self, std: float, factors: Mapping[int, float] | None = None) -> None:
        """As `fill`, from N(0, std^2); vectors of rows (R, D) are multiplied by the factors of their places."""

        def draw(rows: Tensor) -> None:
            if std == 0:
                rows.zero_()
                return
            rows.normal_(std=std)
            for vector, factor in (factors or {}).items():
                if factor != 1:
                    rows[:, vector].mul_(factor)

        self.fill(draw)

    def _fill(self, draw: Callable[[Tensor], object]) -> None:
        for part in self._parts_to_draw():
            if self.scales is None:
                draw(self.rows[part])
            else:
                drawn = torch.empty(part.stop - part.start, *self.row_shape, device=self.device)
                draw(drawn)
                self.write(drawn, part.start)

    def _parts_to_draw(self) -> Iterator[slice]:
        """Ranges of rows that are drawn one after another, as numbers are that are drawn at once.

        On a CPU torch draws 16 numbers at a time, so that a range has a multiple of 16 rows.
        """
        yield slice(0, self.num_rows)

    def fill_new(self, first: int, generator: torch.Generator) -> None:
        """Write what rows first, first + 1, ... start as when they are added to a trained table: zeros."""
        self.write(torch.zeros(1, *self.row_shape).expand(self.num_rows - first, *self.row_shape), first)

    @torch.no_grad()
    def resize(self, num_rows: int) -> Replaced:
        """Have more rows, behind those that are there; the new ones are zero.

        Memory of the old rows is given back while they move, unless something else may hold it.
        """

        def lengthen(rows: Tensor, value: float) -> Tensor:
            return longer_rows(rows, num_rows, value)

        def carry(tensors: list[Tensor], value: float) -> list[Tensor]:
            carried = replaced.carry(tensors, value)
            for tensor in tensors:
                tensor.data = tensor.data.new_empty(0)  # its memory may be gone
            return carried

        self.catch_up()
        replaced = self._replace(lengthen)
        if self.scales is not None:
            self.scales = lengthen(self.scales, 0.0)
        self.num_rows = num_rows
        return Replaced(old=replaced.old, new=replaced.new, carry=carry)

    @torch.no_grad()
    def select(self, ids: Tensor) -> Replaced:
        """Have these rows alone, in this order; ids (N',) int64, distinct."""
        self.catch_up()
        replaced = self._replace(lambda rows, value: chosen_rows(rows, ids))
        if self.scales is not None:
            self.scales = chosen_rows(self.scales, ids)
        self.num_rows = len(ids)
        return replaced

    @torch.no_grad()
    def append(self, tables: Sequence["Table"]) -> None:
        """Have the rows of these tables too, behind those that are there, in their order; rows are copied."""
        first = self.num_rows
        self.resize(first + sum(table.num_rows for table in tables))
        for table in tables:
            if table.device.type != "meta":
                for part in table._wide_parts(table.num_rows):
                    self.write(table.read(part.start, part.stop - part.start), first + part.start)
            first += table.num_rows

    @torch.no_grad()
    def convert_rows(self, row_format: str) -> None:
        """Store the rows in another format from now on; a table in training then needs a new optimizer.

        Both formats are in memory until all rows are converted, and besides them some rows in float32.
        """
        dtype = row_dtype(row_format)
        if dtype == self.dtype:
            return
        self.catch_up()
        shape = self._held_shape()
        rows = self._empty("rows", *stored_shape(shape, dtype), dtype=dtype, device=self.device)
        scales = None
        if dtype in SCALED_DTYPES:
            scales = self._empty("scales", *scales_shape(shape, dtype), dtype=torch.float32, device=self.device)
        for part, stored, own_scales in self.rows_in(row_format):
            rows[part].copy_(stored)
            if scales is not None:
                assert own_scales is not None
                scales[part] = own_scales
        self._keep(rows, trained=self.requires_grad or not self.has_gradients)
        self.scales = scales
        self.trained_in_place &= dtype in EIGHT_BIT_DTYPES

    @torch.no_grad()
    def rows_in(self, row_format: str) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """The rows that are held here in another format, with their scales where it has some, a few at a time."""
        dtype = row_dtype(row_format)
        stored_shape(self.row_shape, dtype)
        for part in self._wide_parts(self._held_shape()[0]):
            wide = self._held(part).float()
            if dtype == self.dtype and self.scales is not None:  # the same bits
                yield part, self.rows[part], self.scales[part]
            elif dtype in SCALED_DTYPES:
                yield part, *quantise(wide, dtype)
            else:
                yield part, wide.to(dtype), None

    def _wide_parts(self, count: int) -> Iterator[slice]:
        """Ranges of `count` rows that are in float32 at once."""
        return blocks(count, _WIDE_BYTES, 4 * math.prod(self.row_shape))

    def _held_shape(self) -> tuple[int, ...]:
        """The shape (N, *X) of the rows that are held here, as numbers."""
        return (self.num_rows, *self.row_shape)

    def _held(self, part: slice) -> Tensor:
        """Some of the rows that are held here, as `read` gives them."""
        return self.read(part.start, part.stop - part.start)

    def like(self, rows: Tensor, *, trained: bool) -> "Table":
        """A table of this kind with these float rows (N', *X), which it takes as they are; trained or frozen."""
        with torch.device("meta"):
            table = self._with_size(len(rows))
        table._keep(rows, trained=trained)
        return table

    def _with_size(self, num_rows: int) -> "Table":
        return self._kind(num_rows, *self.row_shape, backend=self.backend)

    @property
    def _kind(self) -> "type[Any]":
        """What `like` makes."""
        return type(self)

    @torch.no_grad()
    def fused_with(self, others: Sequence["Table"]) -> "Table | None":
        """A frozen table of the rows of this and others, of which theirs become views; None where they cannot.

        All have one dtype and device. `is_made_of` says whether they still are views later.
        """
        tables = [self, *others]
        if any(len(t.parts()) > 1 or type(t) is not type(self) or t.scales is not None for t in tables):
            return None
        rows = empty_rows(
            sum(table.num_rows for table in tables), *self.row_shape, dtype=self.dtype, device=self.device
        )
        torch.cat([table.read() for table in tables], out=rows)
        for table, part in zip(tables, rows.split([table.num_rows for table in tables]), strict=True):
            table.rows.data = part
        return self.like(rows, trained=False)

    def is_made_of(self, tables: Sequence["Table"]) -> bool:
        """Whether rows of these tables are views of this one's, one after another."""
        place = self.rows.data_ptr()
        for table in tables:
            if table.rows.data_ptr() != place:
                return False
            place += table.rows.nbytes
        return True

    def catch_up(self) -> None:
        """Bring all stale rows up to date."""
        for parameter in self.row_parameters():
            prepare_rows(parameter, None)

    def train(self, mode: bool = True) -> "Self":
        """As `nn.Module.train`; on leaving training all rows are brought up to date."""
        if not mode:
            self.catch_up()
        return super().train(mode)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of `nn.Module`; transformers has floats require gradients, and float8 rows cannot."""
        if param is not None and param.dtype in SCALED_DTYPES:
            param.requires_grad_(False)
        super().register_parameter(name, param)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Self":
        """As of `nn.Module`, but `to`, `half` and the like leave rows of 8 bits as they are, and scales in 32 bits."""
        if self.scales is None:
            return super()._apply(fn, recurse)

        def applied(tensor: Tensor) -> Tensor:
            if tensor.dtype in SCALED_DTYPES:
                return fn(movable(tensor)).view(tensor.dtype)
            found = fn(tensor)
            return found if found.dtype.itemsize >= 4 else tensor.to(found.device)

        return super()._apply(applied, recurse)

    def _replicate_for_data_parallel(self) -> "Table":
        if self.watched:
            raise RuntimeError(
                "nn.DataParallel copies tables with their stale rows and does not say so: use "
                "DistributedDataParallel (torchrun), or a single device"
            )
        return super()._replicate_for_data_parallel()

    def _save_to_state_dict(self, *arguments: Any, **options: Any) -> None:
        self.catch_up()
        if self.persistent:
            super()._save_to_state_dict(*arguments, **options)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *lists: list[str],
    ) -> None:
        """As in `nn.Module`, but saved rows of any format become rows of this table's."""
        if not self.persistent:
            return
        self.catch_up()
        rows, scales = state_dict.get(prefix + "rows"), state_dict.get(prefix + "scales")
        if rows is not None and rows.dtype != self.dtype:
            scaled = rows.dtype in SCALED_DTYPES
            if scaled and scales is None:
                missing_keys.append(prefix + "scales")
                del state_dict[prefix + "rows"]
            elif self._takes(rows) and not local_metadata.get("assign_to_params_buffers"):
                del state_dict[prefix + "rows"]
                self.write_saved(rows, state_dict.pop(prefix + "scales") if scaled else None)
                missing_keys = []  # these rows are not
            else:
                wide = widened(rows, state_dict.pop(prefix + "scales")) if scaled else rows
                if self.scales is not None:
                    wide, state_dict[prefix + "scales"] = quantise(wide.float(), self.dtype)
                state_dict[prefix + "rows"] = wide
        self._load_rows(state_dict, prefix, local_metadata, strict, missing_keys, *lists)

    def _takes(self, rows: Tensor) -> bool:
        """Whether saved rows have the shape of this table's, as they would be stored, and it has memory for them."""
        if any(each.is_meta for each in self.row_parameters()) or (rows.dtype == INT4 and self.row_shape[-1] % GROUP):
            return False
        return tuple(rows.shape) == (self.num_rows, *stored_shape(self.row_shape, rows.dtype))

    @torch.no_grad()
    def write_saved(self, rows: Tensor, scales: Tensor | None) -> None:
        """Let all rows be these, in any format, a few at a time: (N, *X) as stored, and their scales or None."""
        for part in self._wide_parts(len(rows)):
            self.write(rows[part] if scales is None else widened(rows[part], scales[part]), part.start)

    def _load_rows(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Load rows (N, *X) in a format of this kind; arguments as of `nn.Module._load_from_state_dict`."""
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        shape = " x ".join(map(str, (self.num_rows, *self.row_shape)))
        return f"{shape}, row_format={self.row_format!r}, backend={self.backend!r}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        keep_rows(self)

    def __reduce__(self) -> Any:
        """Tables that `tables_as` made have a class of no module's, which is made again; copies are not watched."""
        return _unpickled, type(self).__dict__.get("_made_of", (type(self),)), {**self.__dict__, "watched": False}


_implementation: ContextVar[type[Table] | None] = ContextVar("implementation of tables", default=None)


@contextmanager
def tables_as(implementation: type[Table]) -> Iterator[None]:
    """Within this context every table that is made, alone or in a layer or model, is one of this subclass too.

    The subclass replaces what `Table` does with its parameters, and leaves `__init__`'s arguments as they are. Tables
    of kinds that add to `Table`, such as `ExpertTable`, become tables of both classes.
    """
    token = _implementation.set(implementation)
    try:
        yield
    finally:
        _implementation.reset(token)


_drawn_again: ContextVar[bool] = ContextVar("initial rows are drawn again", default=False)


@contextmanager
def rows_drawn_again() -> Iterator[None]:
    """Within this context initial rows of new tables need not be kept, for they are drawn again before they are read.

    Numbers are drawn all the same, so that what follows does not depend on where tables are kept.
    """
    token = _drawn_again.set(True)
    try:
        yield
    finally:
        _drawn_again.reset(token)


def are_rows_drawn_again() -> bool:
    """Whether this is within `rows_drawn_again`."""
    return _drawn_again.get()


_classes: dict[tuple[type, type], type[Table]] = {}


def class_of(implementation: type[Table], kind: type[Table]) -> type[Table]:
    """The class of tables of both: one of them, where it is the other's subclass, or a new one."""
    if issubclass(kind, implementation):
        return kind
    if issubclass(implementation, kind):
        return implementation
    both = (implementation, kind)
    if both not in _classes:
        _classes[both] = type(f"{implementation.__name__}{kind.__name__}", both, {"_made_of": both})
    return _classes[both]


def plain_kind(table: Table) -> type[Table]:
    """The kind of a table without what `tables_as` has added."""
    made_of: tuple[type[Table], ...] = type(table).__dict__.get("_made_of", (Table, Table))
    return made_of[1]


def _unpickled(implementation: type[Table], kind: type[Table] = Table) -> Table:
    return object.__new__(class_of(implementation, kind))


def row_dtype(row_format: str) -> torch.dtype:
    """In which rows of this format are stored; raises ValueError where there is no such format."""
    if row_format not in ROW_FORMATS:
        raise ValueError(f"row_format is {row_format!r}; choose one of {', '.join(ROW_FORMATS)}")
    return ROW_FORMATS[row_format]
