"""Half scores of queries and sub-keys, and the k highest of many scores in a total order.

Shape suffixes as in `reference.py`.
"""

from collections.abc import Callable
from types import EllipsisType

import torch
from torch import Tensor

from peerlm.ops.tensors import has_values


def half_scores(query_THX: Tensor, sub_keys_2HnC: Tensor) -> Tensor:
    """Score each half of every query against that half's sub-keys.

    Args:
        query_THX: queries (T, H, 2C); the first C features meet the first set of sub-keys.
        sub_keys_2HnC: (2, H, n, C), or (2, 1, n, C) where all heads share one set.

    Returns:
        (2, T, H, n), in float32 at least: half-precision inputs are widened first, so that rounding the
        scores does not choose the experts.
    """
    dtype = torch.promote_types(query_THX.dtype, torch.float32)
    query_2THC = query_THX.to(dtype).unflatten(-1, (2, -1)).movedim(-2, 0)
    keys_2HnC = sub_keys_2HnC.to(dtype)
    if keys_2HnC.shape[1] == 1:
        return torch.stack([q_THC @ keys_nC.T for q_THC, (keys_nC,) in zip(query_2THC, keys_2HnC, strict=True)])
    return torch.einsum("sthc,shnc->sthn", query_2THC, keys_2HnC)


TieBreak = Callable[[Tensor | EllipsisType], tuple[Tensor, Tensor]]
"""Takes the mask of rows that have a tie, or `...` for all rows; gives residuals and ids of their entries."""


def top_k(
    scores: Tensor, k: int, tie_break: TieBreak | None = None, *, look_for_ties: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Values and positions of the k highest entries along the last dimension, highest first, in a total order.

    Entries are ordered by score plus residual taken exactly (the residual is what rounding cut off the score),
    equal ones by ascending id; without `tie_break` residuals are zero and ids are positions.

    Args:
        scores: (..., n), float32 or float64.
        k: 1 <= k <= n.
        tie_break: what decides between equal scores.
        look_for_ties: whether to order those rows alone that have a tie. By default so on a CPU; another device would
            have to be waited for, and tensors without values (fake, traced, batched) cannot be looked at.
    """
    if look_for_ties is None:
        look_for_ties = scores.device.type == "cpu" and has_values(scores)
    if look_for_ties:
        return _top_k_of_few_ties(scores, k, tie_break)
    positions = _stable_top_k(scores, k) if tie_break is None else _order(scores, *tie_break(...))[..., :k]
    return scores.gather(-1, positions), positions


def _top_k_of_few_ties(scores: Tensor, k: int, tie_break: TieBreak | None) -> tuple[Tensor, Tensor]:
    """As `top_k`. `torch.topk` leaves the order of equal entries open: rows in which it met a tie are sorted again."""
    values, positions = scores.topk(min(k + 1, scores.shape[-1]))
    tied = (values[..., 1:] == values[..., :-1]).any(dim=-1)
    if tied.any():
        rows = scores[tied]
        order = _order(rows) if tie_break is None else _order(rows, *tie_break(tied))
        positions[tied] = order[..., : positions.shape[-1]]
        values[tied] = rows.gather(-1, positions[tied])
    return values[..., :k], positions[..., :k]


def _order(scores: Tensor, residual: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
    """Positions (..., n) by score, then residual, both descending, then id, ascending."""
    order = torch.arange(scores.shape[-1], device=scores.device).expand_as(scores)
    for key, descending in ((ids, False), (residual, True), (scores, True)):  # least significant key first
        if key is not None:
            order = order.gather(-1, key.gather(-1, order).argsort(dim=-1, descending=descending, stable=True))
    return order


def _stable_top_k(scores: Tensor, k: int) -> Tensor:
    """Positions (..., k) of the k highest scores, equal ones by position, without a look at the values.

    A float32 score and its position make one int64, whose `topk` takes a quarter of the time of a stable sort.
    """
    if scores.dtype != torch.float32:
        return _order(scores)[..., :k]
    bits = (scores + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    last = scores.shape[-1] - 1
    return ((ascending << 32) + (last - torch.arange(last + 1, device=scores.device))).topk(k).indices
