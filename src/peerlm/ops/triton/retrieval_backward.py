"""Gradients of retrieval: those of the scores, of queries, and what `row_gradients` needs for those of the sub-keys.

Shape suffixes as in `ops/reference.py`.
"""

import triton
import triton.language as tl

from peerlm.ops.triton.order import sub_keys_of


@triton.jit
def score_gradients(
    grad_weights,
    weights,
    ids,
    query,
    sub_keys,
    grad_query,
    keys_of_entries,
    grad_scores,
    HEADS: tl.constexpr,
    SETS: tl.constexpr,
    N: tl.constexpr,
    HALF_DIM: tl.constexpr,
    K: tl.constexpr,
    WEIGHTING: tl.constexpr,
    PAIRING: tl.constexpr,
    K_PADDED: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid (T * H,): one token's head.

    grad_weights, weights, ids: (T, H, K); query (T, H, 2, C), sub_keys (2, SETS, n, C) -> grad_query like query;
    for both halves of each entry (T, H, 2, K) which sub-key it has, int64 in 0 .. 2 * SETS * n - 1, and the gradient of
    its score. An id that is no expert's gives NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    rank = tl.arange(0, K_PADDED)
    inside = rank < K
    entry = row * K + rank
    expert_id = tl.load(ids + entry, mask=inside, other=0)
    is_expert = (expert_id >= 0) & (expert_id < N * N)
    i, j = sub_keys_of(tl.where(is_expert, expert_id, 0).to(tl.int32), N, PAIRING)
    set_of_head = (row % HEADS % SETS).to(tl.int32)
    first = (set_of_head * N + i).to(tl.int64)
    second = ((SETS + set_of_head) * N + j).to(tl.int64)
    grad = tl.load(grad_weights + entry, mask=inside, other=0.0)
    weight = tl.load(weights + entry, mask=inside, other=0.0)
    query += row * (2 * HALF_DIM)
    grad_query += row * (2 * HALF_DIM)
    if WEIGHTING == "softmax":
        mean = tl.sum(grad.to(tl.float64) * weight, axis=0)
        grad_score = weight * (grad.to(tl.float64) - mean).to(tl.float32)
    elif WEIGHTING == "sigmoid":
        score = _scores(query, sub_keys, first, inside, HALF_DIM, K_PADDED, BLOCK_C)
        score += _scores(query + HALF_DIM, sub_keys, second, inside, HALF_DIM, K_PADDED, BLOCK_C)
        power = tl.exp(-tl.abs(score))  # 1 - weight has no digits left where the weight is near one
        grad_score = grad * (power / ((1.0 + power) * (1.0 + power))).to(tl.float32)
    elif WEIGHTING == "relu":
        grad_score = tl.where(weight > 0.0, grad, 0.0 * weight)
    else:
        grad_score = grad
    grad_score = tl.where(is_expert, grad_score, float("nan"))
    for half in tl.static_range(2):
        key = second if half else first
        out = (row * 2 + half) * K + rank
        tl.store(keys_of_entries + out, key, mask=inside)
        tl.store(grad_scores + out, grad_score, mask=inside)
        for start in range(0, HALF_DIM, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            of_keys = tl.load(
                sub_keys + key[:, None] * HALF_DIM + c[None, :],
                mask=inside[:, None] & (c < HALF_DIM)[None, :],
                other=0.0,
            )
            gradient = tl.sum(tl.where(inside, grad_score, 0.0)[:, None] * of_keys, axis=0)
            tl.store(grad_query + half * HALF_DIM + c, gradient, mask=c < HALF_DIM)


@triton.jit
def _scores(query, sub_keys, key, inside, HALF_DIM: tl.constexpr, K_PADDED: tl.constexpr, BLOCK_C: tl.constexpr):
    """Half scores of a query's half and the given sub-keys, [places] float64."""
    score = tl.zeros([K_PADDED], tl.float64)
    for start in range(0, HALF_DIM, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        feature = tl.load(query + c, mask=c < HALF_DIM, other=0.0).to(tl.float64)
        of_keys = tl.load(
            sub_keys + key[:, None] * HALF_DIM + c[None, :], mask=inside[:, None] & (c < HALF_DIM)[None, :], other=0.0
        )
        score += tl.sum(feature[None, :] * of_keys, axis=1)
    return score
