"""The k best sub-keys of each half of a query, by float64 scores of all of them.

Shape suffixes as in `ops/reference.py`.
"""

import triton
import triton.language as tl

from peerlm.ops.triton.order import LOWEST, number_at, place_of


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
    present = token < tokens
    row = (token * HEADS + head) * 2 + half
    key = (half * SETS + head % SETS).to(tl.int64) * (HALF_DIM * N)
    column = tl.arange(0, N_PADDED)
    score = tl.zeros([BLOCK_T, N_PADDED], tl.float64)
    for c in range(HALF_DIM):
        feature = tl.load(query + row * HALF_DIM + c, mask=present, other=0.0).to(tl.float64)
        of_keys = tl.load(sub_keys + key + c * N + column, mask=column < N, other=0.0).to(tl.float64)
        score += feature[:, None] * of_keys[None, :]
    place = tl.where((column < N)[None, :], place_of(score), LOWEST)
    for rank in range(K):
        highest, index = tl.max(place, axis=1, return_indices=True, return_indices_tie_break_left=True)
        tl.store(scores + row * K + rank, number_at(highest), mask=present)
        tl.store(indices + row * K + rank, index, mask=present)
        place = tl.where(column[None, :] == index[:, None], LOWEST, place)
