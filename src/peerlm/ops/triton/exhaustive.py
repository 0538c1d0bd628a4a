"""The k best sub-keys of each half of a query, by float64 scores of all of them.

Shape suffixes as in `ops/reference.py`.
"""

import triton
import triton.language as tl

from peerlm.ops.triton.order import LOWEST, number_at, place_of
from peerlm.ops.triton.shortlist import LANES


@triton.jit
def _write_best(
    query,
    sub_keys,
    scores,
    indices,
    row,
    present,
    N: tl.constexpr,
    HALF_DIM: tl.constexpr,
    K: tl.constexpr,
    N_PADDED: tl.constexpr,
):
    """Search `sub_keys` (C, n), transposed, for the queries of a block of rows (t * H + h) * 2 + half."""
    column = tl.arange(0, N_PADDED)
    score = tl.zeros([row.shape[0], N_PADDED], tl.float64)
    for lane in range(LANES):
        one_sum = tl.zeros([row.shape[0], N_PADDED], tl.float64)
        for c in range(lane, HALF_DIM, LANES):
            feature = tl.load(query + row * HALF_DIM + c, mask=present, other=0.0).to(tl.float64)
            of_keys = tl.load(sub_keys + c * N + column, mask=column < N, other=0.0).to(tl.float64)
            one_sum += feature[:, None] * of_keys[None, :]
        score += one_sum
    place = tl.where((column < N)[None, :], place_of(score), LOWEST)
    for rank in range(K):
        highest, index = tl.max(place, axis=1, return_indices=True, return_indices_tie_break_left=True)
        tl.store(scores + row * K + rank, number_at(highest), mask=present)
        tl.store(indices + row * K + rank, index, mask=present)
        place = tl.where(column[None, :] == index[:, None], LOWEST, place)


@triton.jit(do_not_specialize=["tokens"])
def best_of_all(
    query,
    sub_keys,
    scores,
    indices,
    tokens,
    HEADS: tl.constexpr,
    SETS: tl.constexpr,
    N: tl.constexpr,
    HALF_DIM: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    N_PADDED: tl.constexpr,
):
    """Grid (blocks of tokens, heads, 2).

    query (T, H, 2, C), sub_keys (2, SETS, C, n), transposed -> scores (T, H, 2, K) float64 and indices (T, H, 2, K)
    int32, best first, equal scores by index.
    """
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    head, half = tl.program_id(1), tl.program_id(2)
    row = (token * HEADS + head) * 2 + half
    sub_keys += (half * SETS + head % SETS).to(tl.int64) * (HALF_DIM * N)
    _write_best(query, sub_keys, scores, indices, row, token < tokens, N, HALF_DIM, K, N_PADDED)


@triton.jit
def best_of_all_for_missed(
    query,
    sub_keys,
    scores,
    indices,
    missed,
    num_missed,
    HEADS: tl.constexpr,
    SETS: tl.constexpr,
    N: tl.constexpr,
    HALF_DIM: tl.constexpr,
    K: tl.constexpr,
    N_PADDED: tl.constexpr,
):
    """The same for the rows in `missed`, num_missed (1,) of them, which programs take by turns."""
    for each in range(tl.program_id(0), tl.load(num_missed), tl.num_programs(0)):
        row = tl.load(missed + each + tl.zeros([1], tl.int32)).to(tl.int64)
        number = tl.load(missed + each).to(tl.int64)
        of_row = sub_keys + (number % 2 * SETS + number // 2 % HEADS % SETS) * (HALF_DIM * N)
        _write_best(query, of_row, scores, indices, row, row >= 0, N, HALF_DIM, K, N_PADDED)
