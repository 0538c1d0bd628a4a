"""How evenly experts are used so far, in memory that does not depend on how many experts there are.

Shape suffix: E entries of retrievals.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MOST = 2**20
"""Experts of a layer that are counted one by one; of more, a sample is."""
_ENTRIES, _CALLS = 2**18, 256
"""So many entries, of so many calls, wait to be summed up at the most, for that sorts what is counted."""
_MIX = (-7046029254386353131, -4417276706812531889)
"""Odd numbers whose products spread ids over 64 bits."""


class ExpertUse:
    """Sums of the weight that each expert received; `peerlm.usage` defines the figures, which are for any thread.

    Figures are exact while no more than `most` experts were used. From then on the heaviest of these stay counted, and
    of all others a random sample is, from the first token on: figures are estimates of the same.

    Args:
        num_experts: of the layer; it may be changed.
        most: experts that are counted.
    """

    def __init__(self, num_experts: int, most: int = MOST) -> None:
        self.num_experts = num_experts
        self._most = most
        none = torch.zeros(0, dtype=torch.int64)
        counted = _Counted(none, none.double(), none.bool(), 0.0, 0)
        self._state: tuple[_Counted, tuple[tuple[Tensor, Tensor], ...]] = (counted, ())  # replaced, never changed

    def add(self, weights: Tensor, expert_ids: Tensor, mask: Tensor) -> None:
        """Count one retrieval: weights and expert_ids (..., H, K), mask (...) with True for real tokens."""
        magnitude = weights.abs().masked_fill(~mask[..., None, None], 0.0)
        entries = (expert_ids.reshape(-1).to("cpu", torch.int64, copy=True), magnitude.reshape(-1).double().cpu())
        counted, waiting = self._state
        waiting = (*waiting, entries)
        if len(waiting) >= _CALLS or sum(len(ids_E) for ids_E, _ in waiting) >= _ENTRIES:
            counted, waiting = counted.plus(waiting, self._most), ()
        self._state = counted, waiting

    def figures(self) -> tuple[float, float]:
        """Share of the experts that received weight, 0 to 1, and unevenness in nats, 0 to log N."""
        counted, waiting = self._state
        return counted.plus(waiting, self._most).figures(self.num_experts)

    def elements(self) -> int:
        """Numbers that are kept: at most three for each of `most` experts, and those of entries that wait."""
        counted, waiting = self._state
        return 3 * len(counted.ids) + sum(2 * len(ids_E) for ids_E, _ in waiting)


@dataclass(frozen=True)
class _Counted:
    """Distinct experts that are counted, (U,): `always` ones for themselves, others for 2^level each.

    total: the weight of all experts, counted or not.
    """

    ids: Tensor
    weights: Tensor
    always: Tensor
    total: float
    level: int

    def plus(self, entries: tuple[tuple[Tensor, Tensor], ...], most: int) -> "_Counted":
        """With further ids (E,) and weights (E,)."""
        if not entries:
            return self
        ids_E, weights_E = (torch.cat(parts) for parts in zip(*entries, strict=True))
        ids, places = torch.cat([self.ids, ids_E]).unique(return_inverse=True)
        weights = torch.zeros(len(ids), dtype=torch.float64)
        weights.scatter_add_(0, places, torch.cat([self.weights, weights_E]))
        always = torch.zeros(len(ids), dtype=torch.bool)
        always[places[: len(self.ids)]] = self.always
        found = _Counted(ids, weights, always, self.total + weights_E.sum().item(), self.level)._without_others()
        while len(found.ids) > most:
            found = found._thinned(most // 4)
        return found

    def _thinned(self, heaviest: int) -> "_Counted":
        """With half of the sample; the heaviest stay, if so far all were counted."""
        always = self.always
        if self.level == 0:
            always = always.index_fill(0, self.weights.topk(heaviest).indices, True)
        return _Counted(self.ids, self.weights, always, self.total, self.level + 1)._without_others()

    def _without_others(self) -> "_Counted":
        """Without experts that have no weight, or are not counted."""
        kept = (self.weights != 0) & (self.always | (_mixed(self.ids) % 2**self.level == 0))
        return _Counted(self.ids[kept], self.weights[kept], self.always[kept], self.total, self.level)

    def figures(self, num_experts: int) -> tuple[float, float]:
        """As of `ExpertUse`."""
        most = math.log(num_experts)
        stands_for = torch.where(self.always, 1.0, 2.0**self.level).double()
        z = self.weights / (self.total or 1.0)
        share = stands_for.sum().item() / num_experts
        unevenness = most + (stands_for * torch.xlogy(z, z)).sum().item()
        if self.level:  # estimates may lie outside of what is possible
            share, unevenness = min(share, 1.0), min(max(unevenness, 0.0), most)
        return share, unevenness


def _mixed(ids: Tensor) -> Tensor:
    """Numbers of 32 bits that look random, always the same for an id."""
    for factor in _MIX:
        ids = (ids + 1) * factor
        ids = ids ^ ((ids >> 32) & 0xFFFFFFFF)
    return ids & 0xFFFFFFFF
