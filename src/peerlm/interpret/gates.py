"""Which tokens reach a layer's index, and by what its output is multiplied: all by 1, or those that open a pack's gate.

Shape suffixes: T tokens of a pass, O of these that the layer reads.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peerlm.interpret.inspected import InspectedLayer
from peerlm.packs.beside import PackBeside


@dataclass(frozen=True, kw_only=True)
class Opened:
    """The tokens that a layer reads in a pass."""

    tokens: Tensor
    """(O,) int64, on the CPU: their places among all tokens of the pass, rising."""
    gate: Tensor
    """(O,) float32, on the CPU: what the layer's output is multiplied by at each."""
    total: int
    """T."""


class OpenedTokens:
    """What the gates of a forward pass let through, by layer; filled within `watching_gates`."""

    def __init__(self) -> None:
        self._by_number: dict[int, Opened] = {}

    def of(self, layer: InspectedLayer, read: int) -> Opened:
        """The tokens of the current pass of which the layer has just read so many; without a gate all."""
        if layer.pack is None:
            return Opened(tokens=torch.arange(read), gate=torch.ones(read), total=read)
        return self._by_number[layer.number]

    def note(self, layer: InspectedLayer, pack: PackBeside, args: tuple[Any, ...]) -> None:
        """Keep what a pack's gate says, before the pack runs."""
        x_TD, allowed_T = args
        gate_T = pack.gate(x_TD)
        if allowed_T is not None:
            gate_T = gate_T.masked_fill(~allowed_T, 0.0)
        (tokens_O,) = gate_T.nonzero(as_tuple=True)
        self._by_number[layer.number] = Opened(
            tokens=tokens_O.cpu(), gate=gate_T[tokens_O].detach().cpu(), total=len(x_TD)
        )


@contextmanager
def watching_gates(layers: Sequence[InspectedLayer]) -> Iterator[OpenedTokens]:
    """Within this context it is known which tokens each of these layers reads."""
    opened = OpenedTokens()
    with ExitStack() as stack:
        for layer in layers:
            if layer.pack is not None:
                stack.callback(layer.pack.register_forward_pre_hook(_noting(opened, layer)).remove)
        yield opened


def _noting(opened: OpenedTokens, layer: InspectedLayer) -> Any:
    def note(layer: InspectedLayer, module: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(module, PackBeside)
        opened.note(layer, module, args)

    return partial(note, layer)
