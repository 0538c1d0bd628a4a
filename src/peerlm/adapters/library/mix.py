"""Low-rank terms of several adapters, added up for each sequence or token without touching weights.

Shape suffixes: B sequences, T tokens, K adapters per sequence, U adapters in the batch, R rank, I and O widths of a
linear layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from peerlm.adapters.library.lora_files import LoraWeights, LowRank


@dataclass
class Mix:
    """Which adapters a batch uses, and how much of each; the adapters' terms are stacked when a layer first asks."""

    adapters: Sequence[LoraWeights]
    """U adapters."""
    weights: Tensor
    """(B, K), or (B, T, U)."""
    index: Tensor | None = None
    """(B, K) int64: positions in `adapters`; None where weights are those of every adapter for every token."""
    _stacks: dict[str, tuple[Tensor, Tensor, int] | None] = field(default_factory=dict)

    def output(self, module: str, x: Tensor) -> Tensor | None:
        """What the adapters add to a linear layer's output for x (B, T, I): (B, T, O) in x's dtype, None for nothing.

        The arithmetic is in the dtype of the adapters where that is wider than x's.

        Raises:
            ValueError: x is not (B, T, I) with the B sequences that adapters were chosen for.
        """
        if module not in self._stacks:
            self._stacks[module] = self._stack(module, x)
        stack = self._stacks[module]
        if stack is None:
            return None
        down, up, rank = stack
        expected = self.weights.shape[: 1 if self.index is not None else 2]
        if x.ndim != 3 or x.shape[: len(expected)] != expected:
            raise ValueError(
                f"{module} reads {tuple(x.shape)}, but adapters were chosen for {tuple(expected)} sequences (and "
                "tokens); adapters can only be mixed in layers that read (batch, tokens, features)"
            )
        wide = x.to(down.dtype)
        weights = self.weights.to(down.dtype).repeat_interleave(rank, dim=-1)
        if self.index is None:
            return ((wide @ down.T * weights) @ up).to(x.dtype)
        return torch.bmm(torch.bmm(wide, down.transpose(1, 2)) * weights[:, None], up).to(x.dtype)

    def _stack(self, module: str, x: Tensor) -> tuple[Tensor, Tensor, int] | None:
        """Down (B, K R, I) and up (B, K R, O), or (U R, I) and (U R, O); ranks are padded with zeros."""
        terms = [adapter.get(module) for adapter in self.adapters]
        present = [term for term in terms if term is not None]
        if not present:
            return None
        rank = max(len(term.down) for term in present)
        dtype = torch.promote_types(x.dtype, present[0].down.dtype)

        def stacked(part: Callable[[LowRank], Tensor]) -> Tensor:
            rows_URX = torch.zeros(len(terms), rank, part(present[0]).shape[1], dtype=dtype, device=x.device)
            for row, term in zip(rows_URX, terms, strict=True):
                if term is not None:
                    row[: len(term.down)] = part(term)
            return rows_URX

        down, up = stacked(lambda term: term.down), stacked(lambda term: term.up.T)
        if self.index is None:
            return down.flatten(0, 1), up.flatten(0, 1), rank
        return down[self.index].flatten(1, 2), up[self.index].flatten(1, 2), rank
