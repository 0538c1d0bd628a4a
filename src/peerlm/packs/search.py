"""Retrieval over the union of a layer's experts and those of packs, exact in one total order.

Scores of all parts are compared as they come from the backend, in float32 at least; where two of them are equal there,
half scores are computed again in float64 and decide, then the id. Shape suffixes as in `peerlm.ops.reference`, and
R rows, which are tokens' heads, and S candidates of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import EllipsisType

import torch
import torch.nn.functional as F
from torch import Tensor

from peerlm.ops import api
from peerlm.ops.pairing import PAIRINGS
from peerlm.ops.scoring import half_scores, top_k

PACK_PAIRING = "shells"
"""Ids of a pack's experts do not depend on how many there are, nor on the pairing of the layer."""
_FEW_TOKENS = 64
"""Up to so many tokens packs of one size are searched in one call, as further heads; above, only where they matter."""
_SCORES_AT_ONCE = 2**20
"""Half scores that are in memory at a time to find out where packs matter."""
_CLOSED = -1e30
"""The half score of a sub-key that only fills up."""


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The best experts of one or several indices of the same number of sub-keys, K of each, side by side."""

    query: Tensor
    """(T, H, 2 C)"""
    sub_keys: Sequence[Tensor]
    """Of each index, (2, H or 1, n, C)."""
    pairing: str
    first_ids: Sequence[int]
    """What ids of each index begin with in the union."""
    scores: Tensor
    """(T, H, S); where there is none, -inf or less than any expert's."""
    ids: Tensor
    """(T, H, S), in the union."""


@dataclass(frozen=True, kw_only=True)
class Searched:
    """An index to be searched beside a layer's."""

    sub_keys: Tensor
    """(2, H or 1, n, C)."""
    first_id: int
    """What its ids begin with in the union."""
    allowed: Tensor | None
    """For which tokens it counts, bool (T,); None for all."""


def search_packs(query_THX: Tensor, packs: Sequence[Searched], own: Candidates, backend: str) -> list[Candidates]:
    """As many candidates of each pack as `own` has, those that can be among the first of the union.

    Args:
        query_THX: normalised queries.
        packs: they may differ in their numbers of sub-keys.
        own: those of the layer itself.
        backend: a name in `peerlm.ops.api.BACKENDS`.
    """
    k = own.scores.shape[-1]
    if len(query_THX) > _FEW_TOKENS:
        matters_PTH = _may_come_before(query_THX, [pack.sub_keys for pack in packs], own.scores[..., -1].detach())
        return [
            _search_where_it_matters(query_THX, pack, where, k, backend)
            for pack, where in zip(packs, matters_PTH, strict=True)
        ]
    by_size: dict[int, list[Searched]] = {}
    for pack in packs:
        by_size.setdefault(pack.sub_keys.shape[2], []).append(pack)
    return [_search_together(query_THX, group, k, backend) for group in by_size.values()]


def _search_together(query_THX: Tensor, group: Sequence[Searched], k: int, backend: str) -> Candidates:
    """Packs of the same number of sub-keys, searched as further heads."""
    (tokens, heads, _), packs = query_THX.shape, len(group)
    keys = [pack.sub_keys for pack in group]
    stacked = keys[0] if packs == 1 else torch.cat([each.expand(-1, heads, -1, -1) for each in keys], dim=1)
    query = query_THX if packs == 1 else query_THX.repeat(1, packs, 1)
    scores, ids = _best(query, stacked, k, backend)
    scores, ids = (each.view(tokens, packs, heads, k).transpose(1, 2) for each in (scores, ids))
    first_ids = [pack.first_id for pack in group]
    ids = ids + (first_ids[0] if packs == 1 else torch.tensor(first_ids, device=ids.device)[:, None])
    if any(pack.allowed is not None for pack in group):
        everywhere = torch.ones(tokens, dtype=torch.bool, device=scores.device)
        allowed = torch.stack([everywhere if pack.allowed is None else pack.allowed for pack in group], dim=-1)
        scores = scores.masked_fill(~allowed[:, None, :, None], -torch.inf)
    return Candidates(
        query=query_THX,
        sub_keys=keys,
        pairing=PACK_PAIRING,
        first_ids=first_ids,
        scores=scores.flatten(2),
        ids=ids.flatten(2),
    )


def _search_where_it_matters(query_THX: Tensor, pack: Searched, matters_TH: Tensor, k: int, backend: str) -> Candidates:
    """One pack, for these heads of tokens alone."""
    tokens, heads, _ = query_THX.shape
    if pack.allowed is not None:
        matters_TH = matters_TH & pack.allowed[:, None]
    dtype = torch.promote_types(query_THX.dtype, torch.float32)
    scores = torch.full((tokens, heads, k), -torch.inf, dtype=dtype, device=query_THX.device)
    ids = torch.full((tokens, heads, k), pack.first_id, device=scores.device)
    sets = pack.sub_keys.shape[1]
    for which in range(sets):  # heads that share their sub-keys are as good as tokens
        head = slice(None) if sets == 1 else slice(which, which + 1)
        token_R, head_R = matters_TH[:, head].nonzero(as_tuple=True)
        if len(token_R):
            place = token_R, head_R + which
            found = _best(query_THX[place][:, None], pack.sub_keys[:, which : which + 1], k, backend)
            scores = scores.index_put(place, found[0][:, 0])
            ids[place] = found[1][:, 0] + pack.first_id
    return Candidates(
        query=query_THX,
        sub_keys=[pack.sub_keys],
        pairing=PACK_PAIRING,
        first_ids=[pack.first_id],
        scores=scores,
        ids=ids,
    )


@torch.no_grad()
def _may_come_before(query_THX: Tensor, sub_keys: Sequence[Tensor], last_TH: Tensor) -> Tensor:
    """For each pack, where its best expert may come before a score `last`: (packs, T, H) bool.

    The sum of the best half scores is the score of the best expert, up to rounding. The bound is that of
    docs/mathematics.md, doubled for what is rounded here.
    """
    dtype = torch.promote_types(query_THX.dtype, torch.float32)
    keys_2HnC = torch.cat([each.to(dtype) for each in sub_keys], dim=2)
    sizes = [each.shape[2] for each in sub_keys]
    relative = (keys_2HnC.shape[-1] + 8) * 2.0**-22
    length_P2H = torch.stack([part.amax(dim=-1) for part in keys_2HnC.norm(dim=-1).split(sizes, dim=-1)])
    found = []
    tokens_at_once = max(1, _SCORES_AT_ONCE // (query_THX.shape[1] * sum(sizes)))
    for query, last in zip(query_THX.split(tokens_at_once), last_TH.split(tokens_at_once), strict=True):
        best_P2TH = torch.stack([part.amax(dim=-1) for part in half_scores(query, keys_2HnC).split(sizes, dim=-1)])
        length_2TH = query.to(dtype).unflatten(-1, (2, -1)).norm(dim=-1).movedim(-1, 0)
        error_P2TH = length_2TH * length_P2H[:, :, None] * relative
        found.append(~((best_P2TH + error_P2TH).sum(dim=1) + last.abs() * 2.0**-22 < last))
    return torch.cat(found, dim=1)


def _best(query_THX: Tensor, sub_keys_2HnC: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    """Scores and ids (T, H, k) of the k best experts; where there are fewer, all, and others of a lower score."""
    n = sub_keys_2HnC.shape[2]
    if n < k:  # one feature more closes what fills up
        halves = query_THX.to(torch.promote_types(query_THX.dtype, torch.float32)).unflatten(-1, (2, -1))
        query_THX = torch.cat([halves, torch.ones_like(halves[..., :1])], dim=-1).flatten(-2)
        sub_keys_2HnC = F.pad(sub_keys_2HnC.to(query_THX.dtype), (0, 1, 0, k - n))
        closed = torch.zeros_like(sub_keys_2HnC[0, 0])
        closed[n:, -1] = _CLOSED
        sub_keys_2HnC = sub_keys_2HnC + closed
    return api.retrieve(query_THX, sub_keys_2HnC, k, weighting="none", pairing=PACK_PAIRING, backend=backend)


def best_of_union(own: Candidates, others: Sequence[Candidates]) -> tuple[Tensor, Tensor]:
    """As many candidates as `own` has, the best of all together: scores, differentiable, and ids (T, H, K).

    Experts are ordered by score, exactly, descending, then by id, ascending.
    """
    parts = [own, *others]
    scores_THS = torch.cat([part.scores for part in parts], dim=-1)
    ids_THS = torch.cat([part.ids for part in parts], dim=-1)
    with torch.no_grad():

        def break_ties(tied_TH: Tensor | EllipsisType) -> tuple[Tensor, Tensor]:
            assert isinstance(tied_TH, Tensor)
            rank = _exact_ranks(parts, tied_TH, ids_THS[tied_TH])
            return torch.zeros_like(scores_THS[tied_TH]), rank

        _, best_THK = top_k(scores_THS.detach(), own.scores.shape[-1], break_ties, look_for_ties=True)
    return scores_THS.gather(-1, best_THK), ids_THS.gather(-1, best_THK)


def _exact_ranks(parts: Sequence[Candidates], tied_TH: Tensor, ids_RS: Tensor) -> Tensor:
    """The places of all candidates (R, S), of the rows of this mask, in the order by exact score, then id."""
    token_R, head_R = tied_TH.nonzero(as_tuple=True)
    totals, residuals = [], []
    for part in parts:
        query_R2C = part.query[token_R, head_R].double().unflatten(-1, (2, -1))
        ids_of_indices = part.ids[tied_TH].chunk(len(part.sub_keys), dim=-1)
        for keys_2HnC, first_id, ids_RK in zip(part.sub_keys, part.first_ids, ids_of_indices, strict=True):
            _, sets, n, _ = keys_2HnC.shape
            set_R1 = (head_R if sets > 1 else torch.zeros_like(head_R))[:, None]
            pairs = PAIRINGS[part.pairing].sub_keys(ids_RK - first_id, n)
            a, b = (
                (keys_HnC[set_R1, each.clamp(max=n - 1)].double() * query_R2C[:, half, None]).sum(dim=-1)
                for half, (keys_HnC, each) in enumerate(zip(keys_2HnC, pairs, strict=True))
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
