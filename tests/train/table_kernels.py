"""Steps of tables as GPU kernels make them, in plain PyTorch: numbers lie in tensors, and nothing is asked for.

Gradients have a place for each row of a table. Shape suffixes: N rows, X a row's shape.
"""

import torch
from torch import Tensor

from peerlm.ops.operators import PEERLM
from peerlm.ops.row_updates import RowState, RowStep
from peerlm.ops.triton.row_arithmetic import (
    BETA1,
    BETA2,
    BIAS1,
    EPS,
    RATE,
    ROOT_BIAS2,
    STEP,
    WEIGHT_DECAY,
    place_step,
)
from peerlm.ops.triton.row_catch_up import place_rules

__all__ = ["catch_up_entries", "place_rules", "place_step", "update_entries", "update_rows"]


def padded_gradients(
    x: Tensor | None, grad_y: Tensor, ids: Tensor, coefficients: Tensor, num_rows: int
) -> tuple[Tensor, Tensor]:
    """As `peerlm.ops.triton.row_gradients.padded_gradients`."""
    return _occurring(ids, num_rows), PEERLM.ops.row_gradients(x, grad_y, ids, coefficients, num_rows)


def sum_by_row(ids: Tensor, values: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """As `peerlm.ops.api.sum_by_row`."""
    sums = values.new_zeros(num_rows, *values.shape[1:]).index_add_(0, ids, values)
    return _occurring(ids, num_rows), sums


def _occurring(ids: Tensor, num_rows: int) -> Tensor:
    rows = torch.arange(num_rows)
    return torch.where((ids.reshape(-1, 1) == rows).any(0), rows, -1)


def update_rows(table: RowState, ids: Tensor, gradient: Tensor, step: RowStep) -> None:
    """As `peerlm.optim.row_step.update_rows`."""
    assert len(ids) == len(table.rows)
    numbers, occurs = step.placed, ids >= 0
    g = gradient.flatten(1)
    age = (numbers[STEP.value] - table.moments_step)[:, None]
    m = table.exp_avg.flatten(1) * numbers[BETA1.value] ** age + g * (1 - numbers[BETA1.value])
    v = table.exp_avg_sq.flatten(1) * numbers[BETA2.value] ** age + g * g * (1 - numbers[BETA2.value])
    rate = numbers[RATE.value]
    w = table.rows.flatten(1) * (1 - rate * numbers[WEIGHT_DECAY.value])
    w = w - rate / numbers[BIAS1.value] * m / (v.sqrt() / numbers[ROOT_BIAS2.value] + numbers[EPS.value])
    for tensor, new in ((table.exp_avg, m), (table.exp_avg_sq, v), (table.rows, w)):
        _store(tensor, occurs, new)
    for tensor in (table.moments_step, table.weights_step):
        _store(tensor, occurs, numbers[STEP.value].expand(len(ids)))


def catch_up_entries(table: RowState, ids: Tensor | None, rules: Tensor, step: RowStep) -> None:
    """As `peerlm.ops.triton.row_catch_up.catch_up_entries`."""
    numbers, since = step.placed, table.weights_step
    stale = since < numbers[STEP.value]
    if ids is not None:
        stale = stale & (_occurring(ids, len(since)) >= 0)
    words = rules[0].long()
    first_step = words[0] + (words[1] << 12) + (words[2] << 24)
    rule = rules[torch.where(stale, since - first_step + 1, 0)].double()
    aged = (since - table.moments_step)[:, None]
    m = table.exp_avg.flatten(1) * numbers[BETA1.value] ** aged
    root = (table.exp_avg_sq.flatten(1) * numbers[BETA2.value] ** aged).sqrt()
    factor = sum(rule[:, j : j + 1] / (root + rule[:, 8 + j : 9 + j]) for j in range(8))
    w = table.rows.flatten(1)
    _store(table.rows, stale, w - w * rule[:, 16:17] - m * factor)
    _store(since, stale, numbers[STEP.value].expand(len(since)))


def update_entries(table: RowState, ids: Tensor, gradient: Tensor, step: RowStep) -> None:
    """As `peerlm.ops.triton.fused_update.update_entries`."""
    update_rows(table, *sum_by_row(ids, gradient, len(table.rows)), step)


def _store(tensor: Tensor, chosen: Tensor, new: Tensor) -> None:
    chosen = chosen.view(-1, *[1] * (tensor.ndim - 1))
    tensor.copy_(torch.where(chosen, new.view(tensor.shape).to(tensor.dtype), tensor))
