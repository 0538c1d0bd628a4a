"""A row's gradient and its step in one kernel: the gradient is summed in registers and never stored.

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
    mark_updated,
    numbers_of,
    row_key,
    second_of_row,
    tile,
    update_elements,
    update_numbers,
)
from peerlm.ops.triton.segments import segments

_CHUNK = 256
"""Entries that one program sums; of a row with more, chunks are summed by programs of their own, then in order."""


def update_by_gradients(
    table: RowState, step: RowStep, x: Tensor | None, grad_y: Tensor, ids: Tensor, coefficients: Tensor
) -> None:
    """Give every row that occurs in ids (T, P) its gradient's AdamW step, without storing the gradient.

    x: (T, D), or None for a memory's values; grad_y: (T, D); coefficients: (T, P, R), as
    `torch.ops.peerlm.mix_experts_backward` gives them.
    """
    num_rows, (tokens, per_token), dim = len(table.rows), ids.shape, grad_y.shape[1]
    vectors = coefficients.shape[-1]
    if min(tokens, per_token, dim, num_rows) == 0:
        return
    found = segments(ids, num_rows)
    entries = tokens * per_token
    most = min(entries, num_rows)
    x = None if x is None else x.detach().contiguous()
    sources = (x, grad_y.detach().contiguous(), coefficients.detach().contiguous())
    padded = triton.next_power_of_2(vectors)
    elements, warps = tile(triton.next_power_of_2(dim) * padded)
    sizes = {
        "CHUNK": _CHUNK,
        "P": per_token,
        "R": vectors,
        "RP": padded,
        "D": dim,
        "BLOCK": max(1, elements // padded),
        "num_warps": warps,
    }
    sums = None
    if entries > _CHUNK:
        sums = torch.empty(entries // _CHUNK, vectors, dim, dtype=torch.float32, device=grad_y.device)
        _sum_chunks[(entries // _CHUNK,)](
            *sources, found.order, found.starts, found.count, sums, **sizes, SEARCH=entries.bit_length()
        )
    _fused_update[(most,)](
        table.rows,
        table.exp_avg,
        table.exp_avg_sq,
        table.moments_step,
        table.weights_step,
        *sources,
        found.order,
        found.ids,
        found.starts,
        sums,
        numbers_of(step, table.rows.device),
        ROW_WISE=table.exp_avg_sq.ndim == 1,
        RANDOM=step.seed is not None,
        **sizes,
        **PRECISE,
    )


@triton.jit
def _add_entries(
    total,
    x,
    grad_y,
    coefficients,
    order,
    first,
    end,
    vector,
    column,
    P: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
):
    """Add to a tile what entries add to the gradient, in order: coefficients times grad_y (for v), or x (u and g)."""
    here = vector < R
    mask = here[:, None] & (column < D)[None, :]
    for place in range(first, end):
        entry = tl.load(order + place).to(tl.int64)
        coefficient = tl.load(coefficients + entry * R + vector, mask=here, other=0.0)
        at = (entry // P) * D + column
        if x is None:
            source = tl.load(grad_y + at[None, :], mask=mask, other=0.0)
        else:
            source = tl.load(tl.where((vector == 1)[:, None], grad_y + at[None, :], x + at[None, :]), mask, 0.0)
        total += coefficient[:, None] * source
    return total


@triton.jit
def _sum_chunks(
    x,
    grad_y,
    coefficients,
    order,
    starts,
    count,
    sums,
    CHUNK: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """Sum full chunks of long segments, each at the number of the window of CHUNK places in which it begins.

    Two full chunks do not begin in one window, and one that begins in a window holds the window's last place.
    """
    window = tl.program_id(0)
    last = window * CHUNK + CHUNK - 1
    low = tl.full([], 0, tl.int32)
    high = tl.load(count)
    for _ in range(SEARCH):  # of starts[low] <= last < starts[high]
        middle = low + (high - low) // 2
        right = tl.load(starts + middle) <= last
        low = tl.where(right, middle, low)
        high = tl.where(right, high, middle)
    start = tl.load(starts + low)
    end = tl.load(starts + low + 1)
    first = last - (last - start) % CHUNK
    if (last < end) & (end - start > CHUNK) & (first + CHUNK <= end):
        vector = tl.arange(0, RP)
        for begin in range(0, D, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            total = tl.zeros([RP, BLOCK], tl.float32)
            total = _add_entries(total, x, grad_y, coefficients, order, first, first + CHUNK, vector, column, P, R, D)
            at = (window.to(tl.int64) * R + vector)[:, None] * D + column[None, :]
            tl.store(sums + at, total, mask=(vector < R)[:, None] & (column < D)[None, :])


@triton.jit
def _gradient_tile(
    x,
    grad_y,
    coefficients,
    order,
    sums,
    start,
    end,
    vector,
    column,
    CHUNK: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile of a row's gradient: of a long segment the sums of its full chunks, then the entries that are left."""
    total = tl.zeros([RP, BLOCK], tl.float32)
    if sums is not None:
        mask = (vector < R)[:, None] & (column < D)[None, :]
        chunks = tl.where(end - start > CHUNK, (end - start) // CHUNK, 0)
        for chunk in range(chunks):
            window = (start // CHUNK + chunk).to(tl.int64)
            total += tl.load(sums + (window * R + vector)[:, None] * D + column[None, :], mask=mask, other=0.0)
        start += chunks * CHUNK
    return _add_entries(total, x, grad_y, coefficients, order, start, end, vector, column, P, R, D)


@triton.jit
def _fused_update(
    rows,
    exp_avg,
    exp_avg_sq,
    moments_step,
    weights_step,
    x,
    grad_y,
    coefficients,
    order,
    ids,
    starts,
    sums,
    numbers,
    CHUNK: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_WISE: tl.constexpr,
    RANDOM: tl.constexpr,
):
    """One program for each segment."""
    segment = tl.program_id(0).to(tl.int64)
    row = tl.load(ids + segment)
    if row >= 0:
        start = tl.load(starts + segment)
        end = tl.load(starts + segment + 1)
        shared = update_numbers(numbers, age_of_moments(moments_step, row, numbers))
        key = row_key(numbers, UPDATE_KEY, row)
        vector = tl.arange(0, RP)
        here = (vector < R)[:, None]
        second = 0.0
        gradient = tl.zeros([RP, BLOCK], tl.float32)
        if ROW_WISE:
            squares = tl.zeros([RP, BLOCK], tl.float32)
            for begin in range(0, D, BLOCK):
                column = begin + tl.arange(0, BLOCK)
                gradient = _gradient_tile(
                    x, grad_y, coefficients, order, sums, start, end, vector, column, CHUNK, P, R, RP, D, BLOCK
                )
                squares += gradient * gradient
            second = second_of_row(exp_avg_sq, row, tl.sum(tl.sum(squares, 1), 0), shared, R * D)
        for begin in range(0, D, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            if not ROW_WISE or D > BLOCK:  # otherwise the tile at hand is the whole row
                gradient = _gradient_tile(
                    x, grad_y, coefficients, order, sums, start, end, vector, column, CHUNK, P, R, RP, D, BLOCK
                )
            place = vector[:, None] * D + column[None, :]
            mask = here & (column < D)[None, :]
            update_elements(
                rows, exp_avg, exp_avg_sq, row * (R * D), place, mask, gradient, second, key, shared, ROW_WISE, RANDOM
            )
        mark_updated(moments_step, weights_step, row, numbers)
