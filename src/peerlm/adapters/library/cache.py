"""Adapters in memory: loaded when first needed, and dropped least recently used first."""

from collections import OrderedDict
from collections.abc import Callable

from peerlm.adapters.library.lora_files import LoraWeights


class AdapterCache:
    """Least-recently-used adapters, within a limit of bytes.

    Args:
        load: name -> weights.
        max_bytes: of the weights kept; one that is larger is given out and not kept.

    Attributes:
        num_bytes: of the weights that are kept.
        loads: how often weights were loaded.
    """

    def __init__(self, load: Callable[[str], LoraWeights], max_bytes: int):
        if max_bytes < 0:
            raise ValueError(f"cache_bytes is {max_bytes}; it is a number of bytes, so take 0 or more")
        self._load = load
        self._kept: OrderedDict[str, LoraWeights] = OrderedDict()
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.loads = 0

    def __call__(self, name: str) -> LoraWeights:
        """The weights of an adapter."""
        if name in self._kept:
            self._kept.move_to_end(name)
            return self._kept[name]
        weights = self._load(name)
        self.loads += 1
        self._kept[name] = weights
        self.num_bytes += num_bytes(weights)
        while self.num_bytes > self.max_bytes:
            self.num_bytes -= num_bytes(self._kept.popitem(last=False)[1])
        return weights

    def forget(self, name: str) -> None:
        """Drop an adapter if it is there."""
        if name in self._kept:
            self.num_bytes -= num_bytes(self._kept.pop(name))

    def __contains__(self, name: str) -> bool:
        return name in self._kept


def num_bytes(weights: LoraWeights) -> int:
    """Memory of an adapter."""
    return sum(term.num_bytes for term in weights.values())
