"""Gradients of rows, summed row by row over sorted entries.

A row has PARTS vectors: one (a memory's value), or u, v and, if gated, g. Each entry adds a coefficient times a token's
vector to each: grad_y to a value and to v, x to u and g. Segments of more than CHUNK entries are cut into chunks at
fixed places; chunks are summed each by itself, and then in order, so that results are the same bits in every run.
Shape suffixes as in `segments.py`; D width, R parts, N rows of the table.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peerlm.ops.triton.segments import Segments, segments

CHUNK = tl.constexpr(256)
_PROGRAMS = 8192
"""Of a grid whose programs take segments by turns, as how many there are is known on the device alone."""


@triton.jit
def vectors_of(part, x, grad_y):
    """The tokens' vectors that make up the gradient of a part: grad_y or x, (T, D). A value's are given as x."""
    vectors = x
    if part == 1:
        vectors = grad_y
    return vectors


@triton.jit
def _sum_entries(
    order,
    first,
    end,
    vectors,
    coefficients,
    part,
    d,
    P: tl.constexpr,
    PARTS: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sum over the entries at places first .. end - 1 of `order` of coefficient * vector, at d."""
    total = tl.zeros([TILE, d.shape[0]], tl.float32)
    for start in range(first, end, TILE):
        place = start + tl.arange(0, TILE)
        inside = place < end
        entry = tl.load(order + place, mask=inside, other=0).to(tl.int64)
        coefficient = tl.load(coefficients + entry * PARTS + part, mask=inside, other=0.0)
        vector = tl.load(
            vectors + (entry // P * D)[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0
        )
        total += coefficient[:, None] * vector.to(tl.float32)
    return tl.sum(total, axis=0)


@triton.jit
def segment_gradient(
    segment,
    order,
    starts,
    vectors,
    coefficients,
    later_chunks,
    part,
    d,
    P: tl.constexpr,
    PARTS: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
):
    """One part of the gradient of a segment's row at d, a block of 0 .. D - 1, in float32.

    later_chunks are those of `sum_later_chunks`; vectors, those of `vectors_of` this part.
    """
    start = tl.load(starts + segment)
    end = tl.load(starts + segment + 1)
    total = _sum_entries(
        order, start, tl.minimum(end, start + CHUNK), vectors, coefficients, part, d, P, PARTS, D, TILE
    )
    for chunk in range(start + CHUNK, end, CHUNK):
        place = tl.full([], chunk // CHUNK, tl.int64) * PARTS + part
        total += tl.load(later_chunks + place * D + d, mask=d < D, other=0.0)
    return total


@triton.jit(do_not_specialize=["entries"])
def _sum_later_chunks(
    order,
    starts,
    count,
    x,
    grad_y,
    coefficients,
    later_chunks,
    entries,
    P: tl.constexpr,
    PARTS: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum one chunk of a segment, but its first, which starts in this program's CHUNK places of `order`.

    There is one at most, and of the segment that holds the first of these places, as chunks of one segment are CHUNK
    places apart, and those of two segments at least as far: a segment's first chunk lies between.
    """
    place = tl.program_id(0) * CHUNK
    part = tl.program_id(1)
    if place < tl.load(starts + entries):
        segment = 0
        beyond = tl.load(count)
        while beyond - segment > 1:
            middle = (segment + beyond) // 2
            is_before = tl.load(starts + middle) <= place
            segment = tl.where(is_before, middle, segment)
            beyond = tl.where(is_before, beyond, middle)
        start = tl.load(starts + segment)
        end = tl.load(starts + segment + 1)
        chunk = start + tl.cdiv(place - start, CHUNK) * CHUNK
        if (chunk > start) & (chunk < end):
            d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
            vectors = vectors_of(part, x, grad_y)
            total = _sum_entries(
                order, chunk, tl.minimum(end, chunk + CHUNK), vectors, coefficients, part, d, P, PARTS, D, TILE
            )
            to = tl.program_id(0).to(tl.int64) * PARTS + part
            tl.store(later_chunks + to * D + d, total, mask=d < D)


@triton.jit(do_not_specialize=["most"])
def _row_gradients(
    order,
    ids,
    starts,
    count,
    x,
    grad_y,
    coefficients,
    later_chunks,
    out,
    most,
    BY_ROW: tl.constexpr,
    P: tl.constexpr,
    PARTS: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write each segment's gradient to its own place in `out`, or, not BY_ROW, to that of its row.

    Each of the `most` places of `out` is written, those that are no segment's with zeros, unless not BY_ROW.
    """
    part = tl.program_id(1)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    vectors = vectors_of(part, x, grad_y)
    segments = tl.load(count)
    for segment in range(tl.program_id(0), segments, tl.num_programs(0)):
        total = segment_gradient(
            segment, order, starts, vectors, coefficients, later_chunks, part, d, P, PARTS, D, TILE
        )
        row = tl.full([], segment, tl.int64) if BY_ROW else tl.load(ids + segment)
        tl.store(out + (row * PARTS + part) * D + d, total, mask=d < D)
    if BY_ROW:
        for place in range(segments + tl.program_id(0), most, tl.num_programs(0)):
            at = (tl.full([], place, tl.int64) * PARTS + part) * D + d
            tl.store(out + at, tl.zeros([BLOCK_D], tl.float32), mask=d < D)


def tile_of_entries(dim: int) -> tuple[int, int]:
    """How many entries, and how many of their D numbers, a program sums at a time: TILE and BLOCK_D."""
    block_d = min(triton.next_power_of_2(dim), 512)
    return max(4, min(16, 2048 // block_d)), block_d


def sum_later_chunks(by_row: Segments, x: Tensor | None, grad_y: Tensor, coefficients: Tensor) -> Tensor:
    """The chunks of all segments but the first of each: what `segment_gradient` adds; elsewhere uninitialised.

    x: (T, D), or None for a memory's values; grad_y: (T, D); coefficients: (T, P, R) float32; all contiguous.
    Returns (E / CHUNK, rounded up, R, D) float32.
    """
    per_token, parts = coefficients.shape[1:]
    dim = grad_y.shape[-1]
    entries = len(by_row.order)
    tile, block_d = tile_of_entries(dim)
    chunks = triton.cdiv(entries, CHUNK.value)
    later_chunks = torch.empty(chunks, parts, dim, dtype=torch.float32, device=grad_y.device)
    if chunks > 1:
        _sum_later_chunks[(chunks, parts, triton.cdiv(dim, block_d))](
            by_row.order,
            by_row.starts,
            by_row.count,
            grad_y if x is None else x,
            grad_y,
            coefficients,
            later_chunks,
            entries,
            per_token,
            parts,
            dim,
            tile,
            block_d,
        )
    return later_chunks


def _write_gradients(
    by_row: Segments, x: Tensor | None, grad_y: Tensor, coefficients: Tensor, out: Tensor, *, compact: bool
) -> None:
    per_token, parts = coefficients.shape[1:]
    dim = grad_y.shape[-1]
    most_segments = min(len(by_row.order), len(out))
    if most_segments == 0 or dim == 0:
        return
    tile, block_d = tile_of_entries(dim)
    _row_gradients[(min(most_segments, _PROGRAMS), parts, triton.cdiv(dim, block_d))](
        by_row.order,
        by_row.ids,
        by_row.starts,
        by_row.count,
        grad_y if x is None else x,
        grad_y,
        coefficients,
        sum_later_chunks(by_row, x, grad_y, coefficients),
        out,
        len(out),
        compact,
        per_token,
        parts,
        dim,
        tile,
        block_d,
    )


def row_gradients(x: Tensor | None, grad_y: Tensor, ids: Tensor, coefficients: Tensor, num_rows: int) -> Tensor:
    """The gradient of all rows, (num_rows, R, D) float32; zeros of rows that do not occur in ids (T, P).

    x, grad_y, coefficients: as in `sum_later_chunks`. Entries whose id is not in 0 .. num_rows - 1 add to no row.
    """
    grad_y = grad_y.detach()
    out = grad_y.new_zeros(num_rows, coefficients.shape[-1], grad_y.shape[-1])
    _write_gradients(
        segments(ids, num_rows),
        None if x is None else x.detach(),
        grad_y,
        coefficients.detach().contiguous(),
        out,
        compact=False,
    )
    return out


def padded_gradients(
    x: Tensor | None, grad_y: Tensor, ids: Tensor, coefficients: Tensor, num_rows: int
) -> tuple[Tensor, Tensor]:
    """The rows that occur, and their gradients, without asking the device how many they are.

    Arguments as of `row_gradients`. Returns ids (S,) int64, ascending, then -1, with S = min(T * P, num_rows); and
    gradients (S, R, D) float32, zeros where the id is -1.
    """
    with torch.cuda.device_of(grad_y):
        by_row = segments(ids, num_rows)
        most = min(len(by_row.order), num_rows)
        out = torch.empty(most, coefficients.shape[-1], grad_y.shape[-1], dtype=torch.float32, device=grad_y.device)
        _write_gradients(
            by_row,
            None if x is None else x.detach(),
            grad_y.detach(),
            coefficients.detach().contiguous(),
            out,
            compact=True,
        )
    return by_row.ids[:most], out


def sum_by_row(ids: Tensor, values: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """The sums of values (E, *X), in their dtype, of equal ids (E,): as `padded_gradients`, of shape (S, *X)."""
    ones = torch.ones(len(ids), 1, 1, device=ids.device)
    found, sums = padded_gradients(None, values.detach().flatten(1), ids[:, None], ones, num_rows)
    return found, sums.view(-1, *values.shape[1:]).to(values.dtype)
