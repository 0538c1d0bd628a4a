"""Which experts a forward pass retrieves, for each token of each row."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from peerlm.serve.protocol import LayerUse
from peerlm.serve.use import ExpertUse
from peerlm.usage import is_retrieval

EVERY = 64
"""Use is counted in one of so many forward passes: hooks keep a layer from its quickest way."""


class Watch:
    """Counts the use of experts, and says which ones a row's last token used.

    Args:
        model: whose layers retrieve.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._use: dict[str, ExpertUse] = {}
        self._found: dict[str, tuple[int, Tensor, Tensor]] = {}
        self._passes = 0

    @contextmanager
    def watching(self, *, trace: bool) -> Iterator[bool]:
        """A forward pass; yields whether it is watched, which it always is with `trace`."""
        self._passes += 1
        self._found = {}
        if not trace and self._passes % EVERY != 1:
            yield False
            return
        handles = [
            module.register_forward_hook(partial(self._note, path))
            for path, module in self._model.named_modules()
            if isinstance(getattr(module, "num_experts", None), int)
        ]
        try:
            yield True
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, path: str, module: Any, arguments: Any, output: Any) -> None:
        if is_retrieval(output):
            self._found[path] = (module.num_experts, output[0], output[1])

    def count(self, mask_BT: Tensor) -> None:
        """Count what the pass retrieved for the tokens where the mask is true."""
        for path, (experts, weights, ids) in self._found.items():
            weights, ids = (each.view(*mask_BT.shape, *each.shape[-2:]) for each in (weights, ids))
            use = self._use.setdefault(path, ExpertUse(experts))
            use.num_experts = max(use.num_experts, experts)
            use.add(weights, ids, mask_BT)

    def of_row(self, row: int, rows: int) -> dict[str, tuple[tuple[int, float], ...]]:
        """By the path of each layer, ids and weights of the experts that the last token of a row used."""
        found = {}
        for path, (_, weights, ids) in self._found.items():
            own = [each.reshape(rows, -1, *each.shape[-2:])[row, -1].flatten().tolist() for each in (ids, weights)]
            sums: dict[int, float] = {}
            for expert, weight in zip(*own, strict=True):
                sums[expert] = sums.get(expert, 0.0) + weight
            found[path] = tuple(sorted(sums.items(), key=lambda item: (-abs(item[1]), item[0])))
        return found

    def use(self) -> Mapping[str, LayerUse]:
        """How evenly experts were used so far, by the path of each layer."""
        return {path: LayerUse(use.num_experts, *use.figures()) for path, use in list(self._use.items())}
