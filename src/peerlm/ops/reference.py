"""The definition: product-key retrieval and expert mixing in eager PyTorch, any device, any float dtype.

Every other backend is tested against this file. Shape suffixes:
T tokens, D model width, H heads, C half of key_dim, n sub-keys per half, N = n * n experts,
K experts retrieved per head, P = H * K experts per token, R vectors in an expert's row (u, v and, if gated, g).
"""

from types import EllipsisType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peerlm.ops.functions import ACTIVATIONS, WEIGHTINGS
from peerlm.ops.pairing import PAIRINGS
from peerlm.ops.row_formats import movable, rows_at, widened
from peerlm.ops.scoring import half_scores, top_k
from peerlm.ops.tensors import may_have_holes, not_plain


def description() -> str:
    """What this backend is, in one phrase."""
    return "the definition in eager PyTorch, any device, twice differentiable"


def unavailable() -> str:
    """Why this machine does not have this backend: never."""
    return ""


def unsupported(
    op: str,
    *inputs: Tensor,
    ids: Tensor | None = None,
    rows: Tensor | None = None,
    scales: Tensor | None = None,
    row_gradients: bool = False,
) -> str:
    """Why these arguments cannot be computed here: never, but for row gradients of some tensors."""
    if row_gradients and scales is not None:
        return "the definition does not train rows of 8 bits"
    return not_plain(*inputs, ids, rows) if row_gradients else ""


def linear(x_TD: Tensor, weight_OD: Tensor) -> Tensor:
    """The product x W^T, (T, O); autocast applies."""
    return F.linear(x_TD, weight_OD)


def retrieve_ids(scores_2THn: Tensor, k: int, pairing: str = "row-major") -> Tensor:
    """The ids of the k experts with the highest sums of half scores, equal to a search over all n * n.

    Expert (i, j) scores `scores[0, ..., i] + scores[1, ..., j]`. Experts are ordered by that sum taken
    exactly, and equal sums by ascending id. In this order an expert whose halves rank a-th and b-th (from 0) comes
    after the (a + 1) * (b + 1) - 1 others that rank no worse in either half. So only pairs with (a + 1) * (b + 1) <= k
    can be among the first k (He 2024, section 2.2, pruned).

    Args:
        scores_2THn: half scores, (2, ..., n).
        k: experts to retrieve, 1 <= k <= n.
        pairing: a name in `PAIRINGS`, which id expert (i, j) has.

    Returns:
        (..., k) int64, best first.
    """
    return PAIRINGS[pairing].ids(*_retrieve_pairs(scores_2THn, k, pairing), scores_2THn.shape[-1])


def _retrieve_pairs(scores_2THn: Tensor, k: int, pairing: str) -> tuple[Tensor, Tensor]:
    """The sub-keys i and j of `retrieve_ids`, each (..., k) int64."""
    n = scores_2THn.shape[-1]
    rank_a, rank_b = _candidate_ranks(k, scores_2THn.device)
    (best_i, index_i), (best_j, index_j) = (top_k(half, k) for half in scores_2THn)
    score_i, score_j = best_i.index_select(-1, rank_a), best_j.index_select(-1, rank_b)
    total = score_i + score_j

    def tie_break(tied: Tensor | EllipsisType) -> tuple[Tensor, Tensor]:
        i, j, t = score_i[tied], score_j[tied], total[tied]
        shadow = t - i  # Knuth's TwoSum: t + residual is the exact sum
        residual = (i - (t - shadow)) + (j - shadow)
        return residual, PAIRINGS[pairing].ids(index_i[tied][..., rank_a], index_j[tied][..., rank_b], n)

    _, candidate = top_k(total, k, tie_break)
    return index_i.gather(-1, rank_a[candidate]), index_j.gather(-1, rank_b[candidate])


def _candidate_ranks(k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ranks a and b of the pairs with (a + 1) * (b + 1) <= k, made on the device: a copy from the host would wait."""
    count = sum(k // (a + 1) for a in range(k))
    rank = torch.arange(k, device=device)
    of_rank = k // (rank + 1)
    rank_a = rank.repeat_interleave(of_rank, output_size=count)
    first = (of_rank.cumsum(0) - of_rank).repeat_interleave(of_rank, output_size=count)
    return rank_a, torch.arange(count, device=device) - first


def retrieve(
    query_THX: Tensor, sub_keys_2HnC: Tensor, k: int, weighting: str, pairing: str = "row-major"
) -> tuple[Tensor, Tensor]:
    """The k best experts of every head and their weights (He 2024, section 2.1; Lample 2019, section 3.2).

    Args:
        query_THX: queries (T, H, 2C).
        sub_keys_2HnC: (2, H or 1, n, C).
        k: experts per head, 1 <= k <= n.
        weighting: a name in `WEIGHTINGS`, applied to each head's k scores.
        pairing: a name in `PAIRINGS`.

    Returns:
        weights (T, H, k) in float32 at least, differentiable in queries and sub-keys;
        expert ids (T, H, k) int64, best first.
    """
    scores_2THn = half_scores(query_THX, sub_keys_2HnC)
    with torch.no_grad():
        i_THK, j_THK = _retrieve_pairs(scores_2THn, k, pairing)
        ids_THK = PAIRINGS[pairing].ids(i_THK, j_THK, scores_2THn.shape[-1])
    first, second = scores_2THn
    scores_THK = first.gather(-1, i_THK) + second.gather(-1, j_THK)
    return WEIGHTINGS[weighting](scores_THK), ids_THK


def select(rows: Tensor, ids_TP: Tensor) -> Tensor:
    """rows[ids], zeros for the id -1; rows (N, ...), ids of any shape."""
    if not may_have_holes(ids_TP):
        return rows_at(rows, ids_TP)
    hole_TP, stored = ids_TP == -1, movable(rows)
    if len(stored) == 0:
        stored = torch.cat([stored, stored.new_zeros(1, *rows.shape[1:])])
    found = rows_at(stored, torch.where(hole_TP, 0, ids_TP))
    found = found.masked_fill(hole_TP[(...,) + (None,) * (rows.ndim - 1)], 0)
    return found if found.dtype == rows.dtype else found.view(rows.dtype)


class _SelectRows(torch.autograd.Function):
    """rows[ids] whose gradient is sparse: the ids, with repetitions, and the gradients of their rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ids_TP: Tensor) -> Tensor:
        ctx.save_for_backward(ids_TP)
        ctx.shape = rows.shape
        return select(rows, ids_TP)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (ids_TP,) = ctx.saved_tensors
        ids, values = ids_TP.reshape(-1), grad.reshape(-1, *ctx.shape[1:])
        if may_have_holes(ids):
            named = ids != -1
            ids, values = ids[named], values[named]
        return torch.sparse_coo_tensor(ids[None], values, ctx.shape, check_invariants=False), None


def _gather_rows(rows: Tensor, ids_TP: Tensor, scales: Tensor | None, *, row_gradients: bool) -> Tensor:
    """rows[ids], in float32 at least; 8-bit rows (N, ..., D) are multiplied by their scales (N, ...)."""
    gathered = _SelectRows.apply(rows, ids_TP) if row_gradients else select(rows, ids_TP)
    if scales is not None:
        return widened(gathered, select(scales, ids_TP))
    return gathered.to(torch.promote_types(rows.dtype, torch.float32))


def mix_experts(
    x_TD: Tensor,
    weights_TP: Tensor,
    ids_TP: Tensor,
    rows_NRD: Tensor,
    scales_NR: Tensor | None,
    activation: str,
    *,
    row_gradients: bool = False,
) -> Tensor:
    """Sum over a token's experts of `weight * act(u . x) * v`; `weight * (u . x) * act(g . x) * v` if gated.

    Args:
        x_TD: inputs (T, D).
        weights_TP, ids_TP: (T, P); an id may stand several times in a row, and counts each time; -1 is a hole, of
            which nothing comes.
        rows_NRD: expert rows u, v and, if gated, g: (N, 2 or 3, D).
        scales_NR: what 8-bit rows are multiplied by, (N, 2 or 3), or None.
        activation: a name in `ACTIVATIONS`.
        row_gradients: whether the gradient of the rows is a sparse tensor of those that occur, or a dense one.

    Returns:
        (T, D) in the dtype of x; the arithmetic is in that of the rows, float32 at least.
    """
    down, up, *gate = _gather_rows(rows_NRD, ids_TP, scales_NR, row_gradients=row_gradients).unbind(-2)
    x = x_TD.to(down.dtype)
    hidden_TP = torch.einsum("td,tpd->tp", x, down)
    if gate:
        hidden_TP = hidden_TP * ACTIVATIONS[activation](torch.einsum("td,tpd->tp", x, gate[0]))
    else:
        hidden_TP = ACTIVATIONS[activation](hidden_TP)
    return torch.einsum("tp,tpd->td", hidden_TP * weights_TP.to(hidden_TP.dtype), up).to(x_TD.dtype)


def mix_values(weights_TP: Tensor, ids_TP: Tensor, values_ND: Tensor, *, row_gradients: bool = False) -> Tensor:
    """Weighted sum of each token's rows: (T, D) in the dtype of the rows (Lample 2019, equation 2)."""
    values = _gather_rows(values_ND, ids_TP, None, row_gradients=row_gradients)
    return torch.einsum("tp,tpd->td", weights_TP.to(values.dtype), values).to(values_ND.dtype)


def dot_values(x_TD: Tensor, ids_TP: Tensor, values_ND: Tensor, *, row_gradients: bool = False) -> Tensor:
    """Inner products x . row of each token with its rows: (T, P), in the dtype of the rows, float32 at least."""
    values = _gather_rows(values_ND, ids_TP, None, row_gradients=row_gradients)
    return torch.einsum("td,tpd->tp", x_TD.to(values.dtype), values)
