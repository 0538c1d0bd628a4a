"""Native AdamW on chosen rows of a table: what `optim/row_step.py` defines, for rows on a CPU but in float64."""

import sys
from types import ModuleType

import torch
from torch import Tensor

from peerlm.ops.cpu import native
from peerlm.ops.cpu.native import as_bytes, group_by_row
from peerlm.ops.row_formats import EIGHT_BIT_DTYPES
from peerlm.ops.row_updates import CatchUpRules, RowState, RowStep
from peerlm.ops.tensors import has_values

_DTYPES = (torch.float32, torch.bfloat16)


def updates_rows_on(device: torch.device) -> bool:
    """Whether there are kernels for tables on this device."""
    return device.type == "cpu" and not native.unavailable()


def row_kernels(table: RowState) -> ModuleType | None:
    """This module, where its kernels work on this table."""
    return sys.modules[__name__] if supports(table) else None


def supports(table: RowState) -> bool:
    """Whether the native kernels work on this table."""
    moments = [tensor for tensor in (table.exp_avg, table.exp_avg_sq) if tensor is not None]
    tensors = [table.rows, *moments, *([] if table.scales is None else [table.scales])]
    dtypes = {tensor.dtype for tensor in moments} if table.by_weight else {torch.float32}
    return not native.unavailable() and (
        len(dtypes) == 1
        and (table.by_weight or table.exp_avg_sq.dtype == torch.float32)
        and table.rows.dtype in (_DTYPES if table.scales is None else EIGHT_BIT_DTYPES)
        and all(moment.dtype in _DTYPES for moment in moments)
        and all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors)
        and all(map(has_values, tensors))
    )


def rows_behind(table: RowState, ids: Tensor | None, now: int) -> Tensor:
    """As `row_step.rows_behind`."""
    assert table.weights_step is not None
    asked = None if ids is None else ids.flatten().contiguous()
    found = torch.empty(len(table.rows) if asked is None else len(asked), dtype=torch.int64)
    count = native.module.stale_rows(table.weights_step, asked, now, torch.get_num_threads(), found)
    return found[:count]


def update_rows(table: RowState, ids: Tensor | None, gradient_UX: Tensor, step: RowStep) -> None:
    """As `row_step.update_rows`."""
    if ids is None:
        ids = torch.arange(len(table.rows))
    gradient = gradient_UX.detach().flatten(1).contiguous()
    native.module.update_rows(_state(table), ids.contiguous(), gradient, _step(step), torch.get_num_threads())


def catch_up_rows(table: RowState, ids: Tensor, rules: CatchUpRules, step: RowStep) -> None:
    """As `row_step.catch_up_rows`."""
    native.module.catch_up_rows(
        _state(table),
        ids.contiguous(),
        rules.first_step,
        rules.index.contiguous(),
        rules.decay.contiguous(),
        rules.num_nodes.contiguous(),
        rules.weights.contiguous(),
        rules.nodes.contiguous(),
        _step(step),
        torch.get_num_threads(),
    )


def fit_rules(
    a_SK: Tensor, c_SK: Tensor, tolerance: float, spreads: Tensor, num_probes: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """As `optim.catch_up.fit_rules`, to whose rules it comes within rounding; None without native kernels."""
    if native.unavailable():
        return None
    count, most = len(a_SK), len(spreads) + 1
    num_nodes_S = torch.empty(count, dtype=torch.int32)
    weights_SJ, nodes_SJ = a_SK.new_empty(count, most), a_SK.new_empty(count, most)
    native.module.fit_rules(
        a_SK.contiguous(),
        c_SK.contiguous(),
        tolerance,
        spreads,
        num_probes,
        torch.get_num_threads(),
        num_nodes_S,
        weights_SJ,
        nodes_SJ,
    )
    return num_nodes_S, weights_SJ, nodes_SJ


def update_by_gradients(
    table: RowState, step: RowStep, x: Tensor | None, grad_y: Tensor, ids: Tensor, coefficients: Tensor
) -> None:
    """Give every row that occurs in ids (T, P) its gradient's AdamW step, without storing the gradient.

    x: (T, D), or None for a memory's values; grad_y: (T, D); coefficients: (T, P, vectors per row), as
    `torch.ops.peerlm.mix_experts_backward` gives them.
    """
    native.module.update_by_row_gradients(
        *group_by_row(ids, len(table.rows)),
        None if x is None else x.detach(),
        grad_y.detach(),
        coefficients.detach().contiguous(),
        _state(table),
        _step(step),
        torch.get_num_threads(),
    )


def _state(table: RowState) -> object:
    return native.module.RowState(
        as_bytes(table.rows.detach()).flatten(1),
        None if table.exp_avg is None else table.exp_avg.flatten(1),
        table.exp_avg_sq[:, None] if table.exp_avg_sq.ndim == 1 else table.exp_avg_sq.flatten(1),
        table.moments_step,
        table.weights_step,
        *([] if table.scales is None and table.shard is None and table.names is None else [_scales(table)]),
        *_names(table),
    )


def _scales(table: RowState) -> Tensor | None:
    return None if table.scales is None else table.scales.flatten(1)


def _names(table: RowState) -> tuple[Tensor, ...]:
    """Which rows and columns of a whole table these are; empty where they are all of it, in order."""
    if table.names is not None:
        each = torch.arange(len(table.names))
        return each, table.names - each
    if table.shard is None:
        return ()
    shard = table.shard
    *_, width = table.rows.shape
    if table.exp_avg_sq.ndim == 1:  # a row is one run, whose columns are those of the whole
        return shard.firsts, shard.shifts, torch.zeros(1, dtype=torch.int64)
    run = width if table.by_weight else width // table.exp_avg_sq.shape[-1]
    return shard.firsts, shard.shifts, torch.tensor(shard.columns(table.rows.shape[1:], run))


def _step(step: RowStep) -> object:
    return native.module.row_adamw_step(
        step.step,
        float(step.learning_rate),
        step.weight_decay,
        step.beta1,
        step.beta2,
        step.eps,
        None if step.seed is None else step.seed & 0xFFFFFFFF,
    )
