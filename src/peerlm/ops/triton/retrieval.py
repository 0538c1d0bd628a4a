"""Product-key retrieval by Triton kernels: what is checked, allocated and launched.

Nothing here waits for the device. Shape suffixes as in `ops/reference.py`.
"""

import torch
import triton
from torch import Tensor

from peerlm.ops.triton import tiles
from peerlm.ops.triton.exhaustive import best_of_all
from peerlm.ops.triton.limits import too_many_sub_keys
from peerlm.ops.triton.merge import best_pairs
from peerlm.ops.triton.retrieval_backward import score_gradients
from peerlm.ops.triton.row_gradients import row_gradients


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
    with torch.cuda.device_of(query):
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
    _, sets, n, half_dim = sub_keys_2HnC.shape
    scores = query_THX.new_empty(tokens, heads, 2, k, dtype=torch.float64)
    indices = query_THX.new_empty(tokens, heads, 2, k, dtype=torch.int32)
    tile = tiles.exhaustive(n)
    best_of_all[(triton.cdiv(tokens, tile.rows), heads, 2)](
        query_THX,
        sub_keys_2HnC.transpose(2, 3).contiguous(),
        scores,
        indices,
        tokens,
        HEADS=heads,
        SETS=sets,
        N=n,
        HALF_DIM=half_dim,
        K=k,
        BLOCK_T=tile.rows,
        N_PADDED=tile.columns,
        num_warps=tile.warps,
    )
    return scores, indices


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
    with torch.cuda.device_of(query):
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
