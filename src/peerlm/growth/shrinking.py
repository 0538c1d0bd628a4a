"""Layers that shrink: a trained model without the experts that it does not use."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from peerlm.growth.indexed import IndexedLayer, by_table, check_not_shared, find_indexed_layers, record_settings
from peerlm.growth.new_experts import check_usage, usage_of_sub_keys
from peerlm.growth.swap import Carry, check_optimizer, hand_over, swap
from peerlm.layers.product_keys import sub_keys_per_half
from peerlm.ops.pairing import PAIRINGS


@torch.no_grad()
def shrink(
    model: nn.Module,
    num_experts: int | None = None,
    *,
    usage: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, Tensor]:
    """Take experts that are not used from every PEER layer and product-key memory of a model, in place.

    What goes are whole sub-keys, with all experts whose key has one of them: of each half those that took part least.
    The others keep their order, and their experts, in one pass over the table, their rows. Where none of the removed
    experts would have been retrieved, the output keeps its bits; only experts of exactly equal score may replace each
    other.

    Args:
        model: a layer or a model with such layers, every one fully open. The configuration of a transformers model
            follows.
        num_experts: N', a square number below the present N of each; None for the smallest that loses no expert with a
            count in any layer.
        usage: for the name of each layer's index how often each expert was retrieved, as `grow` takes it.
            `peerlm.growth.observe` measures it.
        optimizer: the one that trains the model, between two steps; it keeps its state. Without it, build a
            new optimizer. Gradients are dropped.

    Returns:
        By the name of each index, the old id of each expert that is left, (N',) int64.

    Raises:
        ValueError: the model has no such layer, or one that cannot shrink so; there is no usage; the optimizer does not
            train the model. The model is then as it was.
    """
    layers = find_indexed_layers(model)
    check_not_shared(model, layers)
    used: dict[str, Tensor] = {}
    for layer in layers:
        counts = check_usage(layer, usage, "experts go by how often they are used", "leave the model as it is")
        used[layer.index_name] = usage_of_sub_keys(layer, counts.reshape(-1, counts.shape[-1]).sum(0, keepdim=True))[
            :, 0
        ]
    for group in by_table(layers):  # layers that share a table keep the same experts
        together = torch.stack([used[layer.index_name] for layer in group]).sum(dim=0)
        used |= {layer.index_name: together for layer in group}
    if num_experts is None:
        needed = [int((each > 0).sum(dim=-1).max()) for each in used.values()]
        num_experts = max(*needed, *(layer.index.experts_per_head for layer in layers)) ** 2
    for layer in layers:
        _check_shrinks(layer, num_experts)
    check_optimizer(layers, optimizer)
    n, remaining = math.isqrt(num_experts), {}
    for layer in layers:
        index, old = layer.index, layer.index.sub_keys.shape[2]
        ranked = used[layer.index_name].argsort(dim=-1, descending=True, stable=True)
        kept = ranked[:, :n].sort(dim=-1).values
        first, second = PAIRINGS[index.pairing].sub_keys(torch.arange(num_experts), n)
        remaining[layer.index_name] = PAIRINGS[index.pairing].ids(kept[0][first], kept[1][second], old)
        if layer.table.num_rows > num_experts:
            hand_over(layer.table.select(remaining[layer.index_name]), optimizer)
        carry = _of_halves(kept)
        swap(index, "sub_keys", carry(index.sub_keys, 0.0), optimizer, carry)
        index.num_experts = num_experts
    record_settings(model, num_experts)
    return remaining


def _check_shrinks(layer: IndexedLayer, num_experts: int) -> None:
    index, where = layer.index, layer.where()
    if index.opening is not None:
        raise ValueError(
            f"{where} grew from {index.grown_from} experts and is open at {index.opening.item():g}: "
            "set_opening(model, 1) before it shrinks"
        )
    sub_keys_per_half(num_experts, index.experts_per_head, names=(layer.size_name, "experts_per_head"))
    if num_experts > index.num_experts:
        raise ValueError(f"num_experts is {num_experts}, but {where} has {index.num_experts}; give a smaller square")


def _of_halves(kept_2n: Tensor) -> Carry:
    def carry(old: Tensor, value: float) -> Tensor:
        return torch.stack([half.index_select(1, ids) for half, ids in zip(old, kept_2n.to(old.device), strict=True)])

    return carry
