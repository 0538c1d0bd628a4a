"""Which queries a model's indices get from samples, and which experts they choose."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peerlm.growth.indexed import IndexedLayer, find_indexed_layers
from peerlm.layers.modes import evaluating


@dataclass(frozen=True, kw_only=True)
class Observed:
    """By the name of each index, what `grow` and `shrink` take."""

    usage: dict[str, Tensor] = field(default_factory=dict)
    """How often each head retrieved each expert, (H, N) int64."""
    queries: dict[str, Tensor] = field(default_factory=dict)
    """Queries of the first tokens, (T, H, key_dim)."""


def observe(model: nn.Module, samples: Iterable[Mapping[str, Any]], *, max_queries: int = 8192) -> Observed:
    """Let a model read samples in evaluation mode, and watch its PEER layers and product-key memories.

    Args:
        model: has such layers.
        samples: keyword arguments of forward passes, such as {"input_ids": (batch, sequence)}. Tokens that a layer is
            told to be padding do not count.
        max_queries: tokens whose queries are kept.

    Raises:
        ValueError: no such layers, or one with packs, or no samples.
    """
    layers, observed = find_indexed_layers(model), Observed()
    for layer in layers:
        if getattr(layer.module, "packs", None) is not None:
            raise ValueError(f"{layer.where()} has packs, which change what it retrieves; unload them first")
    device = layers[0].table.device
    handles = [layer.index.register_forward_hook(_Watch(layer, observed, max_queries)) for layer in layers]
    try:
        with evaluating(model):
            for sample in samples:
                model(**{name: each.to(device) if isinstance(each, Tensor) else each for name, each in sample.items()})
    finally:
        for handle in handles:
            handle.remove()
    if not observed.usage:
        raise ValueError("there are no samples to observe the model on; give some")
    return observed


class _Watch:
    """A forward hook of one index."""

    def __init__(self, layer: IndexedLayer, observed: Observed, max_queries: int) -> None:
        self.name, self.observed, self.max_queries = layer.index_name, observed, max_queries

    def __call__(self, index: Any, arguments: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, mask = arguments[0], arguments[1] if len(arguments) > 1 else None
        ids_THK, real = output[1].flatten(0, -3), slice(None) if mask is None else mask.flatten().bool()
        ids_THK = ids_THK[real]
        usage, queries = self.observed.usage, self.observed.queries
        flat = ids_THK + index.num_experts * torch.arange(index.heads, device=ids_THK.device)[:, None]
        counts = flat.flatten().bincount(minlength=index.heads * index.num_experts).view(index.heads, -1)
        usage[self.name] = usage.get(self.name, 0) + counts
        missing = self.max_queries - len(queries.get(self.name, ()))
        if missing > 0:
            query = index.query(x, mask).flatten(0, -3)[real][:missing].float()
            queries[self.name] = torch.cat([queries[self.name], query]) if self.name in queries else query
