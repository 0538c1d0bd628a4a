"""The k best pairs of two halves' best sub-keys, and the weights of their scores.

Shape suffixes as in `ops/reference.py`.
"""

import triton
import triton.language as tl

from peerlm.ops.triton.order import LOWEST, id_of, number_at, place_of

_NO_ID = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["rows"])
def best_pairs(
    half_scores,
    indices,
    weights,
    ids,
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    WEIGHTING: tl.constexpr,
    PAIRING: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    K_PADDED: tl.constexpr,
):
    """Grid (blocks of rows), where a row is a token's head.

    half_scores (rows, 2, K) float64 and indices (rows, 2, K) int32, best first -> weights (rows, K) float32, ids
    (rows, K) int64: by exact sum, equal sums by id.

    The table of sums is merged from its rows, one for each first sub-key. Each offers its best sum that is not taken;
    the best of those is the best of all, because within a row sums fall, and equal ones have higher ids.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    rank = tl.arange(0, K_PADDED)[None, :]
    present = row < rows
    inside = present & (rank < K)
    first = tl.load(half_scores + row * (2 * K) + rank, mask=inside, other=0.0)
    i = tl.load(indices + row * (2 * K) + rank, mask=inside, other=0)
    second_half = row * (2 * K) + K
    taken = tl.zeros([BLOCK_ROWS, K_PADDED], tl.int32)  # of each first sub-key's pairs
    second = tl.load(half_scores + second_half + taken, mask=inside, other=0.0)
    j = tl.load(indices + second_half + taken, mask=inside, other=0)
    score = tl.zeros([BLOCK_ROWS, K_PADDED], tl.float64)
    expert_id = tl.zeros([BLOCK_ROWS, K_PADDED], tl.int32)
    for place in range(K):
        total = first + second
        shadow = total - first  # Knuth's TwoSum: total + residual is the exact sum
        residual = (first - (total - shadow)) + (second - shadow)
        residual = tl.where(residual == residual, residual, 0.0)
        offered = inside & (taken < K)
        by_total = tl.where(offered, place_of(total), LOWEST)
        highest = tl.max(by_total, axis=1, keep_dims=True)
        offered &= by_total == highest
        by_residual = tl.where(offered, place_of(residual), LOWEST)
        offered &= by_residual == tl.max(by_residual, axis=1, keep_dims=True)
        candidate = tl.where(offered, id_of(i, j, N, PAIRING), _NO_ID)
        lowest = tl.min(candidate, axis=1, keep_dims=True)
        offered &= candidate == lowest
        score = tl.where(rank == place, number_at(highest), score)
        expert_id = tl.where(rank == place, lowest, expert_id)
        taken += offered.to(tl.int32)
        more = offered & (taken < K)
        second = tl.load(half_scores + second_half + taken, mask=more, other=second)
        j = tl.load(indices + second_half + taken, mask=more, other=j)
    out = row * K + rank
    tl.store(weights + out, weights_of(score, rank, K, WEIGHTING), mask=inside)
    tl.store(ids + out, expert_id.to(tl.int64), mask=inside)


@triton.jit
def weights_of(score, rank, K: tl.constexpr, WEIGHTING: tl.constexpr):
    """Weights, float32, of float64 scores [rows, places], best first; computed in float64 and rounded once."""
    if WEIGHTING == "softmax":
        best = tl.sum(tl.where(rank == 0, score, 0.0), axis=1, keep_dims=True)
        power = tl.where(rank < K, tl.exp(score - best), 0.0)
        weight = power / tl.sum(power, axis=1, keep_dims=True)
    elif WEIGHTING == "sigmoid":
        weight = 1.0 / (1.0 + tl.exp(-score))
    elif WEIGHTING == "relu":
        weight = tl.where(score < 0.0, 0.0, score)
    else:
        weight = score
    return weight.to(tl.float32)
