"""The k best sub-keys of each half of a query from a shortlist: bfloat16 scores of all, float64 scores of few.

Let an approximate score be off by at most an error that is known. If k sub-keys have approximate scores of at least
`reached`, the k best have at least reached - 2 * error (docs/mathematics.md, "The shortlist of the kernels").
All of those are listed. Where they are too many for the list, or numbers too large for the bound, the row is marked
for the exhaustive search. Shape suffixes as in `ops/reference.py`; S places of a list.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peerlm.ops.triton.order import LOWEST, place_of

LANES = tl.constexpr(4)
"""A float64 score is four sums, of the products at c = 0, 4, 8 ..., at 1, 5, 9 ..., and so on; then they are added.

In this order in all kernels, so that a score has the same bits wherever it is computed; a product of two float32 is
exact in float64.
"""

_TOO_LARGE = tl.constexpr(2.0**120)
"""Norms and their products below it keep bfloat16 scores and all their partial sums finite."""
_HALVINGS = tl.constexpr(12)


def relative_error(half_dim: int) -> float:
    """How much float32 sums of C products are off at most, over the product of both norms.

    2^-21 for each sum: tensor cores may cut off where they do not round.
    """
    return (half_dim + 8) * 2.0**-21


def norms_of(sub_keys_2HnC: Tensor, rounded_2HnC: Tensor) -> Tensor:
    """The largest norms of sub-keys, and of what rounding cut off them, (2, 2, H or 1) float64."""
    exact = sub_keys_2HnC.double()
    return torch.stack([part.square().sum(dim=-1).amax(dim=-1).sqrt() for part in (exact, exact - rounded_2HnC)])


@triton.jit
def _tile_scores(
    queries, sub_keys, start, HALF_DIM: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, WIDEN: tl.constexpr
):
    """Approximate scores of a tile of queries [tokens, features] and sub-keys start .. start + BLOCK_N - 1."""
    c = tl.arange(0, queries.shape[1])[:, None]
    key = start + tl.arange(0, BLOCK_N)[None, :]
    keys = tl.load(sub_keys + key * HALF_DIM + c, mask=(key < N) & (c < HALF_DIM), other=0.0)
    # The interpreter multiplies the bit patterns of bfloat16
    scores = tl.dot(queries.to(tl.float32), keys.to(tl.float32)) if WIDEN else tl.dot(queries, keys)
    return tl.where(key < N, scores, float("-inf"))


@triton.jit(do_not_specialize=["tokens"])
def list_candidates(
    query,
    rounded_query,
    rounded_sub_keys,
    norms_of_keys,
    listed,
    counts,
    missed,
    num_missed,
    tokens,
    HEADS: tl.constexpr,
    SETS: tl.constexpr,
    N: tl.constexpr,
    HALF_DIM: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    RELATIVE_ERROR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Grid (blocks of tokens, heads, 2); K <= BLOCK_N <= N.

    query (T, H, 2, C) float32, and in bfloat16; rounded_sub_keys (2, SETS, n, C) bfloat16; norms_of_keys as of
    `norms_of` -> listed (T, H, 2, S) int32, ascending sub-keys; counts (T, H, 2) int32, how
    many, 0 of rows (t * H + h) * 2 + half that are in `missed`, int32, in any order; num_missed (1,) int32 starts at 0.
    """
    first_token = tl.program_id(0).to(tl.int64) * BLOCK_T
    token = tl.arange(0, BLOCK_T)
    head, half = tl.program_id(1), tl.program_id(2)
    present = first_token + token < tokens
    first_row = (first_token * HEADS + head) * 2 + half
    row = first_row + token * (HEADS * 2)
    set_of_head = half * SETS + head % SETS
    sub_keys = rounded_sub_keys + set_of_head.to(tl.int64) * (N * HALF_DIM)
    c = tl.arange(0, BLOCK_C)
    place = row[:, None] * HALF_DIM + c[None, :]
    inside = present[:, None] & (c < HALF_DIM)[None, :]
    queries = tl.load(rounded_query + place, mask=inside, other=0.0)
    exact = tl.load(query + place, mask=inside, other=0.0).to(tl.float64)
    cut_off = exact - queries.to(tl.float32).to(tl.float64)
    norm, norm_cut_off = tl.sqrt(tl.sum(exact * exact, axis=1)), tl.sqrt(tl.sum(cut_off * cut_off, axis=1))
    longest = tl.load(norms_of_keys + set_of_head)
    longest_cut_off = tl.load(norms_of_keys + 2 * SETS + set_of_head)
    # |q c - q' c'| <= |q - q'| |c| + |q| |c - c'| + |q - q'| |c - c'| (Cauchy), then sums, and what underflows
    size = (norm + norm_cut_off) * (longest + longest_cut_off)
    error = norm_cut_off * longest + (norm + norm_cut_off) * longest_cut_off
    error = 1.000001 * error + RELATIVE_ERROR * size + HALF_DIM * 2.0**-126 * (norm + longest) + 1e-30

    # Sub-keys are dealt into BLOCK_N groups; what K groups' best reach, K sub-keys reach
    best_of_group = tl.full([BLOCK_T, BLOCK_N], float("-inf"), tl.float32)
    for start in range(0, N, BLOCK_N):
        scores = _tile_scores(queries, sub_keys, start, HALF_DIM, N, BLOCK_N, WIDEN)
        best_of_group = tl.maximum(best_of_group, scores)
    reached = tl.min(best_of_group, axis=1)
    beyond = tl.max(best_of_group, axis=1)
    for _ in range(_HALVINGS):
        middle = 0.5 * reached + 0.5 * beyond
        enough = tl.sum((best_of_group >= middle[:, None]).to(tl.int32), axis=1) >= K
        reached = tl.where(enough, middle, reached)
        beyond = tl.where(enough, beyond, middle)

    bound = reached.to(tl.float64) - 2.0 * error
    bound = (bound - tl.abs(bound) * 1e-6).to(tl.float32)  # below, however it is rounded
    listed += first_row * S
    list_of_token = token[:, None] * (HEADS * 2 * S)  # 32 bits are enough within a block
    count = tl.zeros([BLOCK_T], tl.int32)
    for start in range(0, N, BLOCK_N):
        scores = _tile_scores(queries, sub_keys, start, HALF_DIM, N, BLOCK_N, WIDEN)
        chosen = (scores >= bound[:, None]).to(tl.int32)
        to = count[:, None] + tl.cumsum(chosen, axis=1) - 1
        index = start + tl.arange(0, BLOCK_N)[None, :] + tl.zeros([BLOCK_T, BLOCK_N], tl.int32)
        tl.store(listed + list_of_token + to, index, mask=present[:, None] & (chosen > 0) & (to < S))
        count += tl.sum(chosen, axis=1)

    complete = (norm + longest + size < _TOO_LARGE) & (count >= K) & (count <= S)
    tl.store(counts + row, tl.where(complete, count, 0), mask=present)
    to = tl.atomic_add(num_missed + tl.zeros([BLOCK_T], tl.int32), 1, mask=present & (complete == 0), sem="relaxed")
    tl.store(missed + to, row.to(tl.int32), mask=present & (complete == 0))


@triton.jit(do_not_specialize=["rows"])
def best_of_listed(
    query,
    sub_keys,
    listed,
    counts,
    scores,
    indices,
    rows,
    HEADS: tl.constexpr,
    SETS: tl.constexpr,
    N: tl.constexpr,
    HALF_DIM: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Grid (blocks of rows), where a row is a half of a token's head.

    query (rows, C) and sub_keys (2, SETS, n, C), float32; listed (rows, S) and counts (rows,) -> scores (rows, K)
    float64 and indices (rows, K) int32 as of `exhaustive.best_of_all`, with the same bits; nothing where a count is 0.
    """
    entry = tl.arange(0, BLOCK_ROWS * S)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + entry // S
    place = entry % S
    present = row < rows
    valid = present & (place < tl.load(counts + row, mask=present, other=0))
    index = tl.load(listed + row * S + place, mask=valid, other=0)
    set_of_row = row % 2 * SETS + row // 2 % HEADS % SETS
    key = (set_of_row * N + index) * HALF_DIM
    lane = tl.arange(0, LANES)[None, :]
    sums = tl.zeros([BLOCK_ROWS * S, LANES], tl.float64)
    for start in range(0, HALF_DIM, LANES):
        c = start + lane
        inside = valid[:, None] & (c < HALF_DIM)
        feature = tl.load(query + row[:, None] * HALF_DIM + c, mask=inside, other=0.0).to(tl.float64)
        of_key = tl.load(sub_keys + key[:, None] + c, mask=inside, other=0.0).to(tl.float64)
        sums += feature * of_key
    score = tl.sum(tl.where(lane == 0, sums, 0.0), axis=1)
    for each in tl.static_range(1, LANES):  # zeros change nothing: `tl.sum` of all would choose an order
        score += tl.sum(tl.where(lane == each, sums, 0.0), axis=1)
    by_score = tl.where(valid, place_of(score), LOWEST)
    ranks = _ranks(tl.reshape(by_score, [BLOCK_ROWS, S]), S)
    rank = tl.reshape(ranks, [BLOCK_ROWS * S])
    best = valid & (rank < K)
    tl.store(scores + row * K + rank, score, mask=best)
    tl.store(indices + row * K + rank, index, mask=best)


@triton.jit
def _ranks(by_score, S: tl.constexpr):
    """How many of a row's others come before each: those with a higher score, and equal ones at an earlier place."""
    place = tl.arange(0, S)
    other, own = by_score[:, None, :], by_score[:, :, None]
    earlier = place[None, None, :] < place[None, :, None]
    return tl.sum(((other > own) | ((other == own) & earlier)).to(tl.int32), axis=2)
