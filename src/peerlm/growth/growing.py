"""Layers that grow: more experts for a trained model, whose output they leave as it is until they are opened."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from peerlm.growth.indexed import IndexedLayer, by_table, check_not_shared, find_indexed_layers, record_settings
from peerlm.growth.new_experts import check_new_sub_keys, new_sub_keys
from peerlm.growth.swap import check_optimizer, hand_over, padded, swap
from peerlm.layers.product_keys import sub_keys_per_half
from peerlm.ops.pairing import PAIRINGS


@torch.no_grad()
def grow(
    model: nn.Module,
    num_experts: int,
    *,
    keys: str = "random",
    usage: Mapping[str, Tensor] | None = None,
    queries: Mapping[str, Tensor] | None = None,
    noise: float = 0.1,
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 0,
) -> nn.Module:
    """Give every PEER layer and product-key memory of a model more experts, without moving those that it has.

    In place; the model is returned. The output keeps its bits: the new experts are closed. `set_opening` lets them in,
    from not there at 0 to like any other at 1. Their vectors u (and g) are as at initialisation, v are zero, and so are
    new values of a memory.

    Args:
        model: a layer or a model with such layers, of pairing "shells", every one fully open. The configuration of a
            transformers model follows, so that it is saved and loaded as it now is.
        num_experts: N', a square number above the present N of each.
        keys: what new sub-keys start as: "random" as at initialisation; "crowded", near the old ones that are used
            most; or "data", queries of the layer itself.
        usage: of "crowded", for the name of each layer's index (such as "model.layers.1.ffw.product_keys";
            "product_keys" if `model` is the layer) how often each expert was retrieved, (N,) or by head (H, N):
            `{name: u.retrievals_N for name, u in usage.items()}` of `peerlm.usage.record_usage`.
        queries: of "data", for the name of each layer's index queries (T, H, key_dim) of tokens, as
            `ProductKeys.query` gives them. Each half of a new expert's key is that half of one of them, of the root
            mean square of the old sub-keys.
        noise: of "crowded", what is added to the sub-keys, as a share of their root mean square.
        optimizer: the one that trains the model, between two steps: RowAdamW or one of torch's. It keeps its
            state, in which the new entries are zero. Without it, build a new optimizer. Gradients are dropped.
        seed: of what is random; the global generator is not used.

    Parameters are replaced and the old ones emptied, as are the optimizer's old tensors of a table. On Linux, with
    native kernels, the memory of a table is freed while its rows move to a larger one, unless something else may hold
    it. The same holds for each of the optimizer's states.

    Raises:
        ValueError: the model has no such layer, or one that cannot grow so; the optimizer does not train it; a setting
            is impossible. The model is then as it was.
    """
    layers = find_indexed_layers(model)
    check_not_shared(model, layers)
    _check_one_size(model, layers)
    for layer in layers:
        _check_grows(layer, num_experts)
        check_new_sub_keys(layer, keys, usage, queries, noise)
    check_optimizer(layers, optimizer)
    generator = torch.Generator().manual_seed(seed)
    n, before = math.isqrt(num_experts), {type(layer.module): layer.index.num_experts for layer in layers}
    for layer in layers:
        index, old = layer.index, layer.index.num_experts
        count = n - index.sub_keys.shape[2]
        fresh = new_sub_keys(layer, count, keys, usage, queries, noise, generator)
        if layer.table.num_rows < num_experts:  # a table that several layers share grows once
            hand_over(layer.table.resize(num_experts), optimizer)
            layer.table.fill_new(old, generator)
        swap(index, "sub_keys", torch.cat([index.sub_keys, fresh], dim=2), optimizer, padded(2, n))
        index.num_experts = num_experts
        index.grown_from, index.opening = old, torch.zeros((), device=layer.table.device)
    for kind, grown_from in before.items():
        record_settings(model, num_experts, kind=kind, grown_from=grown_from)
    return model


@torch.no_grad()
def set_opening(model: nn.Module, value: float) -> nn.Module:
    """Let the experts of the last growth in at a prior of `value`, in every layer that has grown.

    A softmax weight is multiplied by it once for each half of an expert that is new, before they are scaled to sum 1;
    with other weightings its logarithm is added to the score. At 0 new experts are left out and get no gradient. At 1
    the layer is one like any other from then on, and can grow again. Returns the model.

    Raises:
        ValueError: `value` is not in 0 .. 1, or below 1 where no layer has grown since its last opening.
    """
    if not 0 <= value <= 1:
        raise ValueError(f"opening is {value}; take a number from 0, closed, to 1, fully open")
    growing = [layer.index for layer in find_indexed_layers(model) if layer.index.opening is not None]
    if not growing and value < 1:
        raise ValueError(f"opening is {value}, but every layer is fully open: grow(model, num_experts) first")
    for index in growing:
        if value < 1 and index.opening is not None:
            index.opening.fill_(value)
        else:
            index.opening = index.grown_from = None
    if growing and value == 1:
        record_settings(model, grown_from=None)
    return model


@torch.no_grad()
def to_shells(model: nn.Module, *, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Renumber the experts of every layer of pairing "row-major", so that it can grow; in place, and returned.

    Rows are permuted; each token retrieves the same ones with the same weights. The output keeps its bits, except where
    experts of exactly equal score replace each other. Arguments and errors as those of `grow`.
    """
    layers = [layer for layer in find_indexed_layers(model) if layer.index.pairing != "shells"]
    check_not_shared(model, layers)
    check_optimizer(layers, optimizer)
    for group in by_table(layers):
        index, n = group[0].index, group[0].index.sub_keys.shape[2]
        i, j = PAIRINGS["shells"].sub_keys(torch.arange(n * n), n)
        hand_over(group[0].table.select(PAIRINGS[index.pairing].ids(i, j, n)), optimizer)
        for layer in group:
            layer.index.pairing = "shells"
    record_settings(model, pairing="shells")
    return model


def _check_one_size(model: nn.Module, layers: Sequence[IndexedLayer]) -> None:
    """Raise ValueError where layers of one kind had different numbers of experts, of which a configuration has one."""
    of_kind: dict[type[nn.Module], IndexedLayer] = {}
    for layer in layers:
        other = of_kind.setdefault(type(layer.module), layer)
        if getattr(model, "config", None) is not None and other.index.num_experts != layer.index.num_experts:
            raise ValueError(
                f"{other.where()} has {other.index.num_experts} experts and {layer.where()} "
                f"{layer.index.num_experts}; a saved model says one number for all that grow: it cannot grow"
            )


def _check_grows(layer: IndexedLayer, num_experts: int) -> None:
    index, where = layer.index, layer.where()
    if index.pairing != "shells":
        raise ValueError(
            f"{where} has pairing {index.pairing!r}, in which growth would move experts: call "
            "peerlm.growth.to_shells(model) first, or build it with pairing='shells'"
        )
    if index.opening is not None:
        raise ValueError(
            f"{where} grew from {index.grown_from} experts and is open at {index.opening.item():g}: "
            "set_opening(model, 1) before it grows again"
        )
    sub_keys_per_half(num_experts, index.experts_per_head)
    if num_experts <= index.num_experts:
        raise ValueError(f"num_experts is {num_experts}, but {where} has {index.num_experts}; give a larger square")
