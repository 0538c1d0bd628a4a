"""The places of a text where each expert fires most, in memory that does not grow with the text.

Shape suffixes: N experts, C places kept for each, E firings, U experts among them.
"""

import torch
from torch import Tensor


class TopContexts:
    """For each of `num_experts` experts the `kept` places of the largest magnitude so far; earlier ones first in ties.

    Attributes:
        strength_NC: (N, C) float32, with its sign, by falling magnitude; 0 where there is no place.
        position_NC: (N, C) int32; -1 where there is no place.
    """

    def __init__(self, num_experts: int, kept: int):
        self.strength_NC = torch.zeros(num_experts, kept)
        self.position_NC = torch.full((num_experts, kept), -1, dtype=torch.int32)

    def add(self, ids_E: Tensor, strength_E: Tensor, position_E: Tensor) -> None:
        """Take firings of experts (E,) int64 into account; each (expert, position) once, positions rising."""
        if not len(ids_E):
            return
        kept = self.strength_NC.shape[1]
        ids_U = ids_E.unique()
        known = self.position_NC[ids_U] >= 0
        old_U = ids_U[:, None].expand(-1, kept)[known]
        ids = torch.cat([old_U, ids_E])
        strength = torch.cat([self.strength_NC[ids_U][known], strength_E.float()])
        position = torch.cat([self.position_NC[ids_U][known], position_E.int()])
        order = strength.abs().sort(descending=True, stable=True).indices
        order = order[ids[order].sort(stable=True).indices]
        ids, strength, position = ids[order], strength[order], position[order]
        counts_U = ids.unique_consecutive(return_counts=True)[1]
        first_U = counts_U.cumsum(0) - counts_U
        rank = torch.arange(len(ids)) - first_U.repeat_interleave(counts_U)
        best = rank < kept
        self.strength_NC[ids[best], rank[best]] = strength[best]
        self.position_NC[ids[best], rank[best]] = position[best]
