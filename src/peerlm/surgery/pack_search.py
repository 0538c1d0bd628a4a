"""Retrieval over the union of a layer's experts and those of packs, exact in one total order.

Scores of all parts are compared as they come from the backend, in float32 at least; where two of them are equal there,
half scores are computed again in float64 and decide, then the id. Shape suffixes as in `peerlm.ops.reference`, and
R rows with a tie, S candidates of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from peerlm.ops import api
from peerlm.ops.pairing import PAIRINGS
from peerlm.ops.reference import top_k

PACK_PAIRING = "shells"
"""Ids of a pack's experts do not depend on how many there are, nor on the pairing of the layer."""
_STACKED_TOKENS = 64
"""Up to so many tokens packs of one size are searched in one call, as further heads; above, copies of queries cost
more than calls."""
_CLOSED = -1e30
"""The half score of a sub-key that only fills up."""


@dataclass(frozen=True)
class Part:
    """Candidates of one index: their scores (T, H, K) and ids (T, H, K), and what they are computed from."""

    query: Tensor
    """(T, H, 2 C)"""
    sub_keys: Tensor
    """(2, H or 1, n, C)"""
    pairing: str
    first_id: int
    """What is added to ids, so that those of all parts differ."""
    scores: Tensor
    ids: Tensor


def search_packs(
    query_THX: Tensor, sub_keys: Sequence[Tensor], first_ids: Sequence[int], k: int, backend: str
) -> list[Part]:
    """The k best candidates of each pack: all of them, and others of score -inf, where it has fewer.

    Args:
        query_THX: normalised queries.
        sub_keys: of each pack, (2, H or 1, n, C); n may differ.
        first_ids: id of each pack's first expert in the union.
        k: experts per head.
        backend: a name in `peerlm.ops.api.BACKENDS`.
    """
    groups: list[list[int]] = [[each] for each in range(len(sub_keys))]
    if len(query_THX) <= _STACKED_TOKENS:
        by_size: dict[int, list[int]] = {}
        for each, keys in enumerate(sub_keys):
            by_size.setdefault(keys.shape[2], []).append(each)
        groups = list(by_size.values())
    parts: list[Part | None] = [None] * len(sub_keys)
    for group in groups:
        scores, ids = _search_group(query_THX, [sub_keys[each] for each in group], k, backend)
        for position, each in enumerate(group):
            parts[each] = Part(
                query_THX, sub_keys[each], PACK_PAIRING, first_ids[each], scores[:, position], ids[:, position]
            )
    return [part for part in parts if part is not None]


def _search_group(query_THX: Tensor, sub_keys: Sequence[Tensor], k: int, backend: str) -> tuple[Tensor, Tensor]:
    """Scores and ids (T, packs, H, k) in packs of the same number of sub-keys, searched as further heads."""
    (tokens, heads, _), packs, n = query_THX.shape, len(sub_keys), sub_keys[0].shape[2]
    keys = sub_keys[0] if packs == 1 else torch.cat([each.expand(-1, heads, -1, -1) for each in sub_keys], dim=1)
    query = query_THX[:, None].expand(-1, packs, -1, -1).reshape(tokens, packs * heads, -1)
    if n < k:  # one feature more closes what fills up
        half_queries = query.to(torch.promote_types(query.dtype, torch.float32)).unflatten(-1, (2, -1))
        query = torch.cat([half_queries, torch.ones_like(half_queries[..., :1])], dim=-1).flatten(-2)
        keys = F.pad(keys.to(query.dtype), (0, 1, 0, k - n))
        closed = torch.zeros_like(keys[0, 0])
        closed[n:, -1] = _CLOSED
        keys = keys + closed
    scores, ids = api.retrieve(query, keys, k, weighting="none", pairing=PACK_PAIRING, backend=backend)
    if n < k:
        scores = scores.masked_fill(ids >= n * n, -torch.inf)
    shape = (tokens, packs, heads, k)
    return scores.view(shape), ids.view(shape)


def best_of_union(parts: Sequence[Part], k: int, allowed: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """The k best candidates of all parts together: scores, differentiable in queries and sub-keys, and ids (T, H, k).

    Experts are ordered by score, exactly, descending, then by id, ascending.

    Args:
        parts: the layer's own candidates first.
        k: experts per head.
        allowed: of each part, for which tokens it counts, bool (T,); None for all.
    """
    scores_THS = torch.cat(
        [
            part.scores if some is None else part.scores.masked_fill(~some[:, None, None], -torch.inf)
            for part, some in zip(parts, allowed, strict=True)
        ],
        dim=-1,
    )
    ids_THS = torch.cat([part.ids + part.first_id for part in parts], dim=-1)
    with torch.no_grad():

        def break_ties(tied_TH: Tensor) -> tuple[Tensor, Tensor]:
            rank = _exact_ranks(parts, tied_TH, ids_THS[tied_TH])
            return torch.zeros_like(scores_THS[tied_TH]), rank

        _, best_THK = top_k(scores_THS.detach(), k, break_ties)
    return scores_THS.gather(-1, best_THK), ids_THS.gather(-1, best_THK)


def _exact_ranks(parts: Sequence[Part], tied_TH: Tensor, ids_RS: Tensor) -> Tensor:
    """The places of all candidates (R, S), of the rows of this mask, in the order by exact score, then id."""
    token_R, head_R = tied_TH.nonzero(as_tuple=True)
    totals, residuals = [], []
    for part in parts:
        n, sets = part.sub_keys.shape[2], part.sub_keys.shape[1]
        indices_RK = [each.clamp(max=n - 1) for each in PAIRINGS[part.pairing].sub_keys(part.ids[tied_TH], n)]
        set_R1 = (head_R if sets > 1 else torch.zeros_like(head_R))[:, None]
        query_R2C = part.query[token_R, head_R].double().unflatten(-1, (2, -1))
        a, b = (
            (keys_HnC[set_R1, index_RK].double() * query_R2C[:, half, None]).sum(dim=-1)
            for half, (keys_HnC, index_RK) in enumerate(zip(part.sub_keys, indices_RK, strict=True))
        )
        total = a + b
        shadow = total - a
        totals.append(total)
        residuals.append((a - (total - shadow)) + (b - shadow))  # Knuth's TwoSum, as in `ops.reference`
    order = ids_RS.argsort(dim=-1, stable=True)
    for key in (torch.cat(residuals, dim=-1), torch.cat(totals, dim=-1)):
        order = order.gather(-1, key.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)
