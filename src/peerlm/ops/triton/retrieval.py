"""Product-key retrieval by Triton kernels: what is checked, allocated and launched.

Nothing here waits for the device. Shape suffixes as in `ops/reference.py`.
"""

import torch
import triton
from torch import Tensor

from peerlm.ops.triton import tiles
from peerlm.ops.triton.exhaustive import best_of_all, best_of_all_for_missed
from peerlm.ops.triton.limits import too_many_sub_keys
from peerlm.ops.triton.merge import best_pairs
from peerlm.ops.triton.retrieval_backward import score_gradients
from peerlm.ops.triton.row_gradients import row_gradients
from peerlm.ops.triton.runtime import INTERPRETED
from peerlm.ops.triton.shortlist import best_of_listed, list_candidates, norms_of, relative_error


def _check(query_THX: Tensor, sub_keys_2HnC: Tensor, k: int) -> None:
    """Raise a ValueError where arguments do not fit; `api` does so too, but an operator may be called without it."""
    halves, sets, n, half_dim = sub_keys_2HnC.shape
    _, heads, key_dim = query_THX.shape
    if halves != 2 or key_dim != 2 * half_dim or sets not in (1, heads) or not 1 <= k <= n:
        raise ValueError(
            f"query {tuple(query_THX.shape)} and sub_keys {tuple(sub_keys_2HnC.shape)} do not fit, or k is not in "
            f"1 .. n: k is {k}; they must be (T, H, 2 C) and (2, H or 1, n, C)"
        )
    if reason := too_many_sub_keys(sub_keys_2HnC):
        raise ValueError(reason)


def retrieve(
    query: Tensor, sub_keys: Tensor, k: int, weighting: str, pairing: str = "row-major"
) -> tuple[Tensor, Tensor]:
    """The operator `retrieve`: contiguous float32 tensors -> weights float32 and ids int64, (T, H, k)."""
    _check(query, sub_keys, k)
    tokens, heads, _ = query.shape
    n = sub_keys.shape[2]
    weights = query.new_empty(tokens, heads, k)
    ids = query.new_empty(tokens, heads, k, dtype=torch.int64)
    rows = tokens * heads
    if rows == 0:
        return weights, ids
    scores, indices = _best_of_halves(query, sub_keys, k)
    tile = tiles.merge(k)
    best_pairs[(triton.cdiv(rows, tile.rows),)](
        scores,
        indices,
        weights,
        ids,
        rows,
        N=n,
        K=k,
        WEIGHTING=weighting,
        PAIRING=pairing,
        BLOCK_ROWS=tile.rows,
        K_PADDED=tile.columns,
        num_warps=tile.warps,
    )
    return weights, ids


def _best_of_halves(query_THX: Tensor, sub_keys_2HnC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores float64 and indices int32 of each half's k best sub-keys, (T, H, 2, k), best first."""
    tokens, heads, _ = query_THX.shape
    n, half_dim = sub_keys_2HnC.shape[2:]
    best = (
        query_THX.new_empty(tokens, heads, 2, k, dtype=torch.float64),
        query_THX.new_empty(tokens, heads, 2, k, dtype=torch.int32),
    )
    transposed = sub_keys_2HnC.transpose(2, 3).contiguous()
    tile = tiles.shortlist(tokens, n, half_dim, k)
    if tile is None:
        _search_all(query_THX, transposed, *best)
    else:
        missed = _search_listed(query_THX, sub_keys_2HnC, *best, tile)
        _search_missed(query_THX, transposed, *best, *missed)
    return best


def _search_all(query_THX: Tensor, sub_keys_2HCn: Tensor, scores: Tensor, indices: Tensor) -> None:
    tokens, heads, _ = query_THX.shape
    _, sets, half_dim, n = sub_keys_2HCn.shape
    tile = tiles.exhaustive(n)
    best_of_all[(triton.cdiv(tokens, tile.rows), heads, 2)](
        query_THX,
        sub_keys_2HCn,
        scores,
        indices,
        tokens,
        HEADS=heads,
        SETS=sets,
        N=n,
        HALF_DIM=half_dim,
        K=scores.shape[-1],
        BLOCK_T=tile.rows,
        N_PADDED=tile.columns,
        num_warps=tile.warps,
    )


def _search_listed(
    query_THX: Tensor, sub_keys_2HnC: Tensor, scores: Tensor, indices: Tensor, tile: tiles.Shortlist
) -> tuple[Tensor, Tensor]:
    """Search what shortlists hold; returns the rows, in no order, whose list is not sure to hold the best: how many.

    A row is a half of a token's head, (t * H + h) * 2 + half: (T * H * 2,) int32, and (1,) int32.
    """
    tokens, heads, _ = query_THX.shape
    _, sets, n, half_dim = sub_keys_2HnC.shape
    k, rows = scores.shape[-1], tokens * heads * 2
    listed = indices.new_empty(rows, tile.places)
    counts, missed = indices.new_empty(rows), indices.new_empty(rows)
    num_missed = torch.zeros(1, dtype=torch.int32, device=query_THX.device)
    rounded_sub_keys = sub_keys_2HnC.bfloat16()
    shape = {"HEADS": heads, "SETS": sets, "N": n, "HALF_DIM": half_dim, "K": k, "S": tile.places}
    list_candidates[(triton.cdiv(tokens, tile.tokens), heads, 2)](
        query_THX,
        query_THX.bfloat16(),
        rounded_sub_keys,
        norms_of(sub_keys_2HnC, rounded_sub_keys),
        listed,
        counts,
        missed,
        num_missed,
        tokens,
        **shape,
        RELATIVE_ERROR=relative_error(half_dim),
        BLOCK_T=tile.tokens,
        BLOCK_N=tile.groups,
        BLOCK_C=tile.features,
        WIDEN=INTERPRETED,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    best_of_listed[(triton.cdiv(rows, tile.lists),)](
        query_THX,
        sub_keys_2HnC,
        listed,
        counts,
        scores,
        indices,
        rows,
        **shape,
        BLOCK_ROWS=tile.lists,
        num_warps=tile.ranking_warps,
    )
    return missed, num_missed


def _search_missed(
    query_THX: Tensor, sub_keys_2HCn: Tensor, scores: Tensor, indices: Tensor, missed: Tensor, num_missed: Tensor
) -> None:
    """Search all sub-keys for the rows in `missed`; how many they are, the device alone knows."""
    heads = query_THX.shape[1]
    _, sets, half_dim, n = sub_keys_2HCn.shape
    tile = tiles.exhaustive_for_one(n)
    best_of_all_for_missed[(min(len(missed), tiles.PROGRAMS_FOR_MISSED),)](
        query_THX,
        sub_keys_2HCn,
        scores,
        indices,
        missed,
        num_missed,
        HEADS=heads,
        SETS=sets,
        N=n,
        HALF_DIM=half_dim,
        K=scores.shape[-1],
        N_PADDED=tile.columns,
        num_warps=tile.warps,
    )


def num_missed(query: Tensor, sub_keys: Tensor, k: int) -> Tensor | None:
    """How many of the T * H * 2 halves of queries need the exhaustive search, (1,) int32 on the device.

    None where shortlists are not used: for few tokens, few sub-keys, or sizes they do not take. Arguments as of the
    operator `retrieve`.
    """
    _check(query, sub_keys, k)
    tokens, heads, _ = query.shape
    n, half_dim = sub_keys.shape[2:]
    tile = tiles.shortlist(tokens, n, half_dim, k)
    if tile is None:
        return None
    scores = query.new_empty(tokens, heads, 2, k, dtype=torch.float64)
    with torch.cuda.device_of(query):
        return _search_listed(query, sub_keys, scores, torch.empty_like(scores, dtype=torch.int32), tile)[1]


def retrieve_backward(
    grad_weights: Tensor,
    weights: Tensor,
    ids: Tensor,
    query: Tensor,
    sub_keys: Tensor,
    weighting: str,
    pairing: str = "row-major",
) -> tuple[Tensor, Tensor]:
    """The operator `retrieve_backward`: gradients of the query and of the sub-keys, float32.

    An id that is no expert's gives NaN: to ask for it would be to wait for the device.
    """
    _check(query, sub_keys, ids.shape[-1])
    tokens, heads, _ = query.shape
    _, sets, n, half_dim = sub_keys.shape
    k = ids.shape[-1]
    grad_query = torch.empty_like(query)
    if tokens * heads == 0:
        return grad_query, torch.zeros_like(sub_keys)
    keys_of_entries = ids.new_empty(tokens * heads * 2, k)
    grad_scores = query.new_empty(tokens * heads * 2, k, 1)
    tile = tiles.score_gradients(k, half_dim)
    score_gradients[(tokens * heads,)](
        grad_weights.contiguous(),
        weights,
        ids,
        query,
        sub_keys,
        grad_query,
        keys_of_entries,
        grad_scores,
        HEADS=heads,
        SETS=sets,
        N=n,
        HALF_DIM=half_dim,
        K=k,
        WEIGHTING=weighting,
        PAIRING=pairing,
        K_PADDED=tile.rows,
        BLOCK_C=tile.columns,
        num_warps=tile.warps,
    )
    queries = query.view(tokens * heads * 2, half_dim)
    grad_sub_keys = row_gradients(None, queries, keys_of_entries, grad_scores, 2 * sets * n)
    return grad_query, grad_sub_keys.view(sub_keys.shape)
