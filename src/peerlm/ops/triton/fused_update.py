"""A row's gradient and its step in one kernel: what adds up to the gradient is summed in registers.

Shape suffixes: T tokens, P entries per token, R vectors per row, D their width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peerlm.ops.row_updates import RowState, RowStep
from peerlm.ops.triton.row_arithmetic import (
    PRECISE,
    UPDATE_KEY,
    age_of_moments,
    load_weights,
    mark_updated,
    numbers_of,
    random_words,
    row_key,
    second_of_row,
    stepped,
    supports,
    update_elements,
    update_numbers,
)
from peerlm.ops.triton.row_gradients import segment_gradient, sum_later_chunks, tile_of_entries, vectors_of
from peerlm.ops.triton.scaled_rows import codes_of, following_scale, size_of
from peerlm.ops.triton.segments import segments

_ELEMENTS_PER_WARP = 256
_MOST_OF_A_ROW_WISE_STEP = 256
"""At once, where the second moment is one of the row: the gradient is summed twice, which takes more registers."""
_MOST_OF_A_SCALED_STEP = 128
"""At once, of rows of 8 bits: the gradient is summed once more, and codes are packed and unpacked."""


def update_by_gradients(
    table: RowState, step: RowStep, x: Tensor | None, grad_y: Tensor, ids: Tensor, coefficients: Tensor
) -> None:
    """Give every row that occurs in ids (T, P) its gradient's AdamW step, without storing the gradient.

    x: (T, D), or None for a memory's values; grad_y: (T, D); coefficients: (T, P, R), as
    `torch.ops.peerlm.mix_experts_backward` gives them; all float32. Entries whose id is no row's change nothing.
    """
    num_rows, dim = len(table.rows), grad_y.shape[1]
    if not supports(table):
        raise ValueError(
            "fused=True: the Triton kernels cannot round a part of a table in bfloat16 or 8 bits as the whole is "
            "rounded, nor keep one second moment for some columns; keep one for each row (row_wise=True), or, of rows "
            "that have gradients, pass fused=False"
        )
    most_segments = min(ids.numel(), num_rows)
    if most_segments == 0 or dim == 0:
        return
    with torch.cuda.device_of(table.rows):
        by_row = segments(ids, num_rows)
        x = None if x is None else x.detach().contiguous()
        grad_y, coefficients = grad_y.detach().contiguous(), coefficients.detach().contiguous()
        tile, block_d = tile_of_entries(dim)
        row_wise = table.exp_avg_sq.ndim == 1
        block_d = min(block_d, _MOST_OF_A_ROW_WISE_STEP) if row_wise else block_d
        block_d = block_d if table.scales is None else min(block_d, _MOST_OF_A_SCALED_STEP)
        _fused_update[(most_segments,)](
            codes_of(table.rows),
            table.scales,
            table.exp_avg,
            table.exp_avg_sq,
            table.moments_step,
            table.weights_step,
            by_row.order,
            by_row.ids,
            by_row.starts,
            grad_y if x is None else x,
            grad_y,
            coefficients,
            sum_later_chunks(by_row, x, grad_y, coefficients),
            numbers_of(step, table.rows.device),
            table.names,
            P=ids.shape[1],
            PARTS=coefficients.shape[-1],
            D=dim,
            TILE=tile,
            BLOCK_D=block_d,
            ROW_WISE=row_wise,
            RANDOM=step.seed is not None,
            num_warps=max(1, block_d // _ELEMENTS_PER_WARP),
            **PRECISE,
        )


def update_entries(table: RowState, ids: Tensor, gradient_EX: Tensor, step: RowStep) -> None:
    """One AdamW step of the rows that occur in ids (E,) int64, in any order, each by the sum of its gradients.

    So the gradients of several backward passes are added up, and no host learns how many rows there are. gradient_EX:
    (E, *row_shape), float32 or bfloat16, of which the sums are in float32. The table has no rows of 8 bits.
    """
    assert table.scales is None
    gradient = gradient_EX.detach().flatten(1)
    ones = torch.ones(len(ids), 1, 1, device=ids.device)
    update_by_gradients(table, step, None, gradient, ids[:, None], ones)


@triton.jit
def _fused_update(
    rows,
    scales,
    exp_avg,
    exp_avg_sq,
    moments_step,
    weights_step,
    order,
    ids,
    starts,
    x,
    grad_y,
    coefficients,
    later_chunks,
    numbers,
    names,
    P: tl.constexpr,
    PARTS: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROW_WISE: tl.constexpr,
    RANDOM: tl.constexpr,
):
    """One program for each segment.

    A row-wise second moment, and a scale that follows its vector, need the whole gradient before the step: it is summed
    once more for each, the later times from caches.
    """
    segment = tl.program_id(0)
    row = tl.load(ids + segment)
    if row >= 0:
        shared = update_numbers(numbers, age_of_moments(moments_step, row, numbers))
        key = row_key(numbers, UPDATE_KEY, row, names)
        second = 0.0
        if ROW_WISE:
            squares = tl.zeros([BLOCK_D], tl.float32)
            for part in tl.static_range(PARTS):
                vectors = vectors_of(part, x, grad_y)
                for first in range(0, D, BLOCK_D):
                    d = first + tl.arange(0, BLOCK_D)
                    gradient = segment_gradient(
                        segment, order, starts, vectors, coefficients, later_chunks, part, d, P, PARTS, D, TILE
                    )
                    squares += gradient * gradient
            second = second_of_row(exp_avg_sq, row, tl.sum(squares, 0), shared, PARTS * D)
        for part in tl.static_range(PARTS):
            vectors = vectors_of(part, x, grad_y)
            scale = None
            following = None
            if scales is not None:
                scale = tl.load(scales + row * PARTS + part)
                largest = tl.zeros([BLOCK_D], tl.int32)
                for first in range(0, D, BLOCK_D):
                    d = first + tl.arange(0, BLOCK_D)
                    gradient = segment_gradient(
                        segment, order, starts, vectors, coefficients, later_chunks, part, d, P, PARTS, D, TILE
                    )
                    column = part * D + d
                    at = row * (PARTS * D) + column
                    weight = stepped(
                        load_weights(rows, at, scale, d < D),
                        exp_avg,
                        exp_avg_sq,
                        at,
                        random_words(key, column),
                        d < D,
                        gradient,
                        second,
                        shared,
                        ROW_WISE,
                        RANDOM,
                        False,
                    )
                    largest = tl.maximum(largest, tl.where(d < D, size_of(weight), 0))
                following = following_scale(rows, scale, tl.max(largest, 0))
                tl.debug_barrier()  # one thread stores it, and every thread has to have read the old one
                tl.store(scales + row * PARTS + part, following)
            for first in range(0, D, BLOCK_D):
                d = first + tl.arange(0, BLOCK_D)
                gradient = segment_gradient(
                    segment, order, starts, vectors, coefficients, later_chunks, part, d, P, PARTS, D, TILE
                )
                update_elements(
                    rows,
                    exp_avg,
                    exp_avg_sq,
                    row * (PARTS * D),
                    part * D + d,
                    d < D,
                    gradient,
                    second,
                    key,
                    shared,
                    scale,
                    following,
                    ROW_WISE,
                    RANDOM,
                )
        mark_updated(moments_step, weights_step, row, numbers)
