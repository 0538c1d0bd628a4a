"""The seam between those that read a table's rows and the optimizer that trains them.

An optimizer whose step skips rows without a gradient watches the table: code that is about to read rows says so
first (`prepare_rows`), and the optimizer brings them up to date. Readers work the same without an optimizer.
Shape suffixes: N rows of a table, U of them, each of shape `row_shape` (the table is (N, *row_shape)).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from peerlm.ops.compiled import never_compiled
from peerlm.ops.row_formats import SCALED_DTYPES
from peerlm.ops.row_keeping import rows_change
from peerlm.ops.row_shards import RowShard
from peerlm.ops.tensors import is_fake
from peerlm.ops.watched import watch_reads, with_views

_WATCHER = "_peerlm_row_watcher"
_as_they_are: ContextVar[bool] = ContextVar("rows_as_they_are", default=False)


@dataclass(frozen=True, kw_only=True)
class RowState:
    """A table and what AdamW remembers of its rows; its tensors are updated in place."""

    rows: Tensor
    """(N, *row_shape): float32, float64 or bfloat16, or int8 or float8_e4m3fn with scales."""
    exp_avg: Tensor | None
    """First moments, like `rows`, in the state's dtype; None without a first moment."""
    exp_avg_sq: Tensor
    """Second moments, like `rows`; or (N,), the mean over each row; or (N, *X, B), X without the last dimension: the
    mean over each B-th of each vector."""
    moments_step: Tensor | None
    """(N,) int32: the step whose moments are stored; 0 where none are. None in lazy mode, where they do not age."""
    weights_step: Tensor | None
    """(N,) int32: the step up to which a row's weights are right. None in lazy mode."""
    scales: Tensor | None = None
    """float32, (N, *row_shape) without its last dimension: what each vector of rows of 8 bits is multiplied by."""
    shard: RowShard | None = None
    """Which part of a table the rows are; None: all of it."""
    names: Tensor | None = None
    """(N,) int64: of which row of a table each of these is, where they are some of it in any order; None: the same."""

    @property
    def by_weight(self) -> bool:
        """Whether each weight has a second moment of its own."""
        return self.exp_avg_sq.shape == self.rows.shape


@dataclass(frozen=True, kw_only=True)
class RowStep:
    """The numbers of one AdamW step."""

    step: int
    """Counted from 1."""
    learning_rate: float | Tensor
    """A tensor on a GPU stays there, where the table's kernels have `place_step`."""
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    seed: int | None
    """Of stochastic rounding to bfloat16; None rounds to nearest."""
    placed: Tensor | None = None
    """These numbers on the table's device, as its kernels' `place_step` gives them; None where they are not yet."""


@dataclass(frozen=True)
class CatchUpRules:
    """For each distinct step s, how rows last right at s become right now; S of them, all tensors on the CPU."""

    first_step: int
    index: Tensor
    """int32: entry s - first_step is the number of the rule for s, -1 where there is none."""
    decay: Tensor
    """(S,) float64: 1 - P(s, t)."""
    num_nodes: Tensor
    """(S,) int32: how many of a rule's nodes count; the others have weight 0."""
    weights: Tensor
    """(S, at most 8) float64: B_j."""
    nodes: Tensor
    """(S, at most 8) float64: R_j, positive."""


class RowWatcher(Protocol):
    """What an optimizer leaves at a table that it watches."""

    def before_read(self, parameter: Tensor, ids: Tensor | None) -> None:
        """Bring these rows, or with None all, up to date."""

    def takes_row_gradients(self, parameter: Tensor) -> bool:
        """Whether a sparse gradient is welcome."""

    def fused_update(self, parameter: Tensor) -> tuple[RowState, RowStep] | None:
        """The update that a backward pass applies in place of giving a gradient; None where it gives one."""

    def release(self, parameter: Tensor) -> None:
        """Another watcher takes over: leave all rows up to date."""


class RowHolder(Protocol):
    """Something with rows that are looked up."""

    watched: bool
    """Set once an optimizer watches any of its rows: its look-ups then belong `outside_graphs`."""

    users: int
    """How many layers look rows up."""

    trained_in_place: bool
    """Whether rows of 8 bits, which have no gradient, are trained: by an optimizer's update in the backward pass."""

    def row_parameters(self) -> Sequence[Tensor]:
        """The parameters that hold rows."""

    def scales_of(self, parameter: Tensor) -> Tensor | None:
        """What each vector of a parameter's rows is multiplied by, in memory that changes with the table's."""


_holders: WeakSet[RowHolder] = WeakSet()
_OUTSIDE = (
    "RowAdamW brings rows up to date before they are read, which a compiled graph cannot do: "
    "compile without fullgraph=True; export in evaluation mode with strict=False"
)


def watch_rows(parameter: Tensor, watcher: RowWatcher) -> None:
    """Let `watcher` learn of reads of `parameter`, (N, *row_shape), a plain tensor or parameter.

    An earlier watcher brings all rows up to date first. The table keeps its watcher alive: stale rows
    stay readable when nothing else refers to the optimizer any more. Any other read, by any function of PyTorch,
    brings all rows up to date first (`ops/watched.py`).
    """
    earlier = _watcher(parameter)
    if earlier is not None and earlier is not watcher:
        earlier.release(parameter)
    if not is_fake(parameter):  # of which nobody reads values
        watch_reads(parameter, partial(prepare_rows, parameter, None))
    setattr(parameter, _WATCHER, watcher)
    for holder in list(_holders):
        if any(each is parameter for each in holder.row_parameters()):
            holder.watched = True


def look_up(parameter: Tensor, ids: Tensor | None, compute: Callable[[Tensor, bool], Tensor]) -> Tensor:
    """What `compute` makes of a table of which it reads the rows `ids` (int64, any shape), with None any.

    They are up to date then. Compute is also told whether to give the table a sparse gradient: a
    `torch.sparse_coo_tensor` of its size with indices (1, U) and values (U, *row_shape).
    """
    if _watcher(parameter) is None:
        _check_transforms(parameter)
        return compute(parameter, False)
    prepare_rows(parameter, ids)
    with torch._C.DisableTorchFunctionSubclass():
        return with_views(compute(parameter, wants_row_gradients(parameter)), [parameter])


def _check_transforms(parameter: Tensor) -> None:
    """Raise RuntimeError where a transform of `torch.func` has wrapped a table whose rows may be behind."""
    if torch.compiler.is_compiling():
        return
    while torch._C._functorch.is_functorch_wrapped_tensor(parameter):
        parameter = torch._C._functorch.get_unwrapped(parameter)
        if _watcher(parameter) is not None:
            raise RuntimeError(
                "a transform of torch.func hides which rows are read of a table that RowAdamW trains: give it copies, "
                "{name: p.detach().clone() for name, p in layer.named_parameters()}"
            )


def outside_graphs(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Call a function outside of compiled graphs, as look-ups must be of a table that an optimizer watches."""
    return never_compiled(_OUTSIDE, function, *arguments)


def prepare_rows(parameter: Tensor, ids: Tensor | None) -> None:
    """Say that rows of `parameter` are about to be read; does nothing without an optimizer that watches.

    Rows change in place without a trace in autograd: those already read in this step are up to date and stay
    as they are.

    Args:
        parameter: the table, (N, *row_shape).
        ids: int64 row numbers of any shape, repetitions allowed; None for all N rows.
    """
    watcher = _watcher(parameter)
    if watcher is not None and rows_may_catch_up():
        watcher.before_read(parameter, ids)


def keep_rows(holder: RowHolder) -> None:
    """Say that an object holds the rows of a table, for as long as it lives."""
    _holders.add(holder)


def trained_rows() -> set[int]:
    """The `id` of every parameter that holds rows of a table now, and is trained."""
    return {
        id(parameter)
        for holder in list(_holders)
        for parameter in holder.row_parameters()
        if parameter.requires_grad or holder.trained_in_place
    }


def scales_of(parameter: Tensor) -> Tensor | None:
    """What each vector of a table's rows is multiplied by, to be changed in place; None for rows without scales."""
    if parameter.dtype not in SCALED_DTYPES:
        return None
    for holder in list(_holders):
        if any(each is parameter for each in holder.row_parameters()):
            return holder.scales_of(parameter)
    return None


def is_shared(parameter: Tensor) -> bool:
    """Whether several layers look up rows of this parameter."""
    return any(
        holder.users > 1 and any(each is parameter for each in holder.row_parameters()) for holder in list(_holders)
    )


def is_watched(parameter: Tensor) -> bool:
    """Whether an optimizer watches this table, and may change its rows without a trace in the tensor's version."""
    return _watcher(parameter) is not None


def rows_may_catch_up() -> bool:
    """Whether this is outside of `rows_as_they_are`."""
    return not _as_they_are.get()


@contextmanager
def rows_as_they_are() -> Iterator[None]:
    """Within this context no rows catch up: for who saves them together with the state of their optimizer."""
    token = _as_they_are.set(True)
    try:
        yield
    finally:
        _as_they_are.reset(token)


def wants_row_gradients(parameter: Tensor) -> bool:
    """Whether a backward pass should give `parameter` a sparse gradient.

    That is a `torch.sparse_coo_tensor` of the table's size with indices (1, U) and values (U, *row_shape).
    """
    watcher = _watcher(parameter)
    return watcher is not None and watcher.takes_row_gradients(parameter)


def fused_row_update(parameter: Tensor, ids: Tensor | None = None) -> tuple[RowState, RowStep] | None:
    """The update that a backward pass applies to the rows of `parameter` in place of giving a gradient.

    The caller must apply it once to every row that has a gradient. None where no optimizer asks for it, and where
    several layers look rows up, whose gradients are to be summed first. Raises RuntimeError on a second backward pass
    in one step.

    ids: the rows that have a gradient, int64, any shape; None: there are no values yet.
    """
    watcher = _watcher(parameter)
    update = None if watcher is None or is_shared(parameter) else watcher.fused_update(parameter)
    if update is not None and ids is not None:
        rows_change(parameter, ids)
    return update


def _watcher(parameter: Tensor) -> RowWatcher | None:
    return getattr(parameter, _WATCHER, None)
