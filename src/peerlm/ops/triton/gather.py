"""Rows of a table gathered by the entries of tokens, some entries at a time, and how many at a time.

Rows (N, R, D) are float32, bfloat16, float16, or 8-bit with scales (N, R); they become float32 as soon as they are
used. Offsets are int64. An entry whose id is not in 0 .. N - 1 reads nothing: what multiplies its vectors is NaN, so
that its token's results are NaN. An entry of id -1 is a hole: it is passed over, and nothing is written for it.
"""

import triton
import triton.language as tl
from torch import Tensor

WIDEST = 4096
"""Of the vectors that a program holds whole."""
_NUMBERS = 4096
"""Of one part that a program gathers at a time: u and v in bfloat16 are 16 KB, while as much is under way."""
_NUMBERS_PER_WARP = 512
"""Of these, where rows are wide. With more registers spilled on sm_90, with fewer for narrow rows on sm_80."""


def is_held_whole(dim: int) -> bool:
    """Whether a program holds vectors of D numbers whole."""
    return dim <= WIDEST


def tile_of_entries(rows: Tensor) -> tuple[int, int, int]:
    """How a program gathers vectors of rows (N, R, D): TILE of entries, BLOCK_D of numbers, and how many warps it has.

    Half as many entries where they have more than 4 bytes for each place of a vector, or are of 8 bits, which take
    registers to be unpacked: these are scarce. The number of warps does not depend on how many tokens there are: the
    order of sums, and so their bits, may follow from it.
    """
    _, parts, dim = rows.shape
    block_d = min(triton.next_power_of_2(dim), WIDEST)
    numbers = _NUMBERS if rows.element_size() > 1 and parts * rows.element_size() <= 4 else _NUMBERS // 2
    tile = max(2, min(16, numbers // block_d))
    return tile, block_d, max(4, tile * block_d // _NUMBERS_PER_WARP) if block_d >= 1024 else 4


@triton.jit
def load_ids(ids, first, num_rows, P: tl.constexpr, TILE: tl.constexpr):
    """Entries first .. first + TILE - 1 of a token, whose ids (P,) these are.

    Returns numbers, which there are, rows, and which of these are in the table. A hole, of id -1, is not there.
    """
    entry = first + tl.arange(0, TILE)
    row = tl.load(ids + entry, mask=entry < P, other=-1)
    is_entry = row != -1
    return entry, is_entry, row, is_entry & (row >= 0) & (row < num_rows)


@triton.jit
def load_vectors(rows, row, is_row, part, d, R: tl.constexpr, D: tl.constexpr):
    """One part of each row at d, a block of 0 .. D - 1, as stored (TILE, BLOCK_D); zeros where there is no row."""
    start = (row * R + part) * D
    mask = is_row[:, None] & (d < D)[None, :]
    return tl.load(rows + start[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def load_scales(scales, row, is_row, part, R: tl.constexpr):
    """What each row's vector of this part is multiplied by; NaN where there is no row. Without scales it is 1."""
    if scales is None:
        scale = tl.where(is_row, 1.0, float("nan"))
    else:
        scale = tl.load(scales + row * R + part, mask=is_row, other=float("nan"))
    return scale


@triton.jit
def load_token(vectors, token, d, D: tl.constexpr):
    """A token's vector (D,) at d, a block of 0 .. D - 1."""
    return tl.load(vectors + token * D + d, mask=d < D, other=0.0)


@triton.jit
def dots(vectors, x, scale):
    """Inner products of gathered vectors (TILE, BLOCK_D) with a token's: (TILE,)."""
    return tl.sum(vectors.to(tl.float32) * x[None, :], axis=1) * scale
