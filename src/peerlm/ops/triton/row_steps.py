"""Steps of `optim.RowAdamW` on a GPU's tables: what `optim/row_step.py` defines, without a word to the host.

Row numbers that are not in 0 .. N - 1, as the padding of ids, change nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peerlm.ops.row_updates import RowState, RowStep
from peerlm.ops.triton.fused_update import update_entries
from peerlm.ops.triton.row_arithmetic import (
    PRECISE,
    UPDATE_KEY,
    age_of_moments,
    mark_updated,
    numbers_of,
    place_step,
    row_key,
    row_length,
    second_of_row,
    supports,
    tile,
    update_elements,
    update_numbers,
)
from peerlm.ops.triton.row_catch_up import catch_up_entries, catch_up_rows, place_rules, rows_behind

__all__ = [
    "catch_up_entries",
    "catch_up_rows",
    "place_rules",
    "place_step",
    "rows_behind",
    "supports",
    "update_entries",
    "update_rows",
]


def update_rows(table: RowState, ids: Tensor | None, gradient_UX: Tensor, step: RowStep) -> None:
    """As `row_step.update_rows`; ids may be padded, by numbers out of range, and the gradient by anything.

    Where moments do not age, or were stored one step ago, and are not row-wise, theirs are the definition's bits. Rows
    of 8 bits have no gradient to be given: `fused_update.update_by_gradients` makes their steps.
    """
    assert table.scales is None
    count = len(table.rows) if ids is None else len(ids)
    length = row_length(table)
    if count == 0 or length == 0:
        return
    block, warps = tile(length)
    with torch.cuda.device_of(table.rows):
        _update_rows[(count,)](
            table.rows,
            table.exp_avg,
            table.exp_avg_sq,
            table.moments_step,
            table.weights_step,
            None if ids is None else ids.contiguous(),
            gradient_UX.detach().contiguous(),
            numbers_of(step, table.rows.device),
            table.names,
            len(table.rows),
            LEN=length,
            BLOCK=block,
            ROW_WISE=table.exp_avg_sq.ndim == 1,
            RANDOM=step.seed is not None,
            num_warps=warps,
            **PRECISE,
        )


@triton.jit(do_not_specialize=["num_rows"])
def _update_rows(
    rows,
    exp_avg,
    exp_avg_sq,
    moments_step,
    weights_step,
    ids,
    gradients,
    numbers,
    names,
    num_rows,
    LEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_WISE: tl.constexpr,
    RANDOM: tl.constexpr,
):
    """One program for each row."""
    number = tl.program_id(0).to(tl.int64)
    row = number
    if ids is not None:
        row = tl.load(ids + number)
    if (row >= 0) & (row < num_rows):
        shared = update_numbers(numbers, age_of_moments(moments_step, row, numbers))
        key = row_key(numbers, UPDATE_KEY, row, names)
        second = 0.0
        if ROW_WISE:
            squares = tl.zeros([BLOCK], tl.float32)
            for first in range(0, LEN, BLOCK):
                column = first + tl.arange(0, BLOCK)
                gradient = tl.load(gradients + number * LEN + column, mask=column < LEN, other=0.0).to(tl.float32)
                squares += gradient * gradient
            second = second_of_row(exp_avg_sq, row, tl.sum(squares, 0), shared, LEN)
        for first in range(0, LEN, BLOCK):
            column = first + tl.arange(0, BLOCK)
            mask = column < LEN
            gradient = tl.load(gradients + number * LEN + column, mask=mask, other=0.0).to(tl.float32)
            update_elements(
                rows,
                exp_avg,
                exp_avg_sq,
                row * LEN,
                column,
                mask,
                gradient,
                second,
                key,
                shared,
                None,
                None,
                ROW_WISE,
                RANDOM,
            )
        mark_updated(moments_step, weights_step, row, numbers)
