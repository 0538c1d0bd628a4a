"""Layers that grow: more experts for a trained model, whose output they leave as it is until they are opened."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peerlm.layers import PEER
from peerlm.layers.product_keys import sub_keys_per_half
from peerlm.layers.row_table import empty_rows
from peerlm.ops.pairing import PAIRINGS
from peerlm.ops.rows import prepare_rows
from peerlm.optim.replace import check_between_steps, holds, replace_parameter
from peerlm.surgery.new_experts import check_new_sub_keys, fill_new_rows, new_sub_keys
from peerlm.surgery.record import conversion_of

Carry = Callable[[Tensor, float], Tensor]


@torch.no_grad()
def grow(
    model: nn.Module,
    num_experts: int,
    *,
    keys: str = "random",
    usage: Mapping[str, Tensor] | None = None,
    noise: float = 0.1,
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 0,
) -> nn.Module:
    """Give every PEER layer of a model more experts, without moving those that it has; in place, and returned.

    The output keeps its bits: the new experts are closed. `set_opening` lets them in, from not there at 0 to like any
    other at 1. Their vectors u (and g) are as at initialisation, v are zero.

    Args:
        model: a PEER layer or a model with such layers, of pairing "shells", every one fully open. The configuration
            of a transformers model follows, so that it is saved and loaded as it now is.
        num_experts: N', a square number above the present N.
        keys: what new sub-keys start as: "random" as at initialisation, or "crowded", near the old ones that are used
            most.
        usage: of "crowded", for the name of each layer's index (such as "model.layers.1.ffw.product_keys";
            "product_keys" if `model` is the layer) how often each expert was retrieved, (N,) or by head (H, N):
            `{name: u.retrievals_N for name, u in usage.items()}` of `peerlm.metrics.record_usage`.
        noise: of "crowded", what is added to the sub-keys, as a share of their root mean square.
        optimizer: the one that trains the model, between two steps: RowAdamW or one of torch's. It goes on with its
            state, in which the new entries are zero. Without it, an optimizer must be built anew. Gradients are
            dropped.
        seed: of what is random; the global generator is not used.

    At most the old and the new table of one layer are held at a time, and then of each of the optimizer's states.

    Raises:
        ValueError: the model has no PEER layer, or one that cannot grow so; the optimizer does not train it; a setting
            is impossible. The model is then as it was.
    """
    layers = _peer_layers(model)
    for name, layer in layers.items():
        _check_grows(layer, name, num_experts)
        check_new_sub_keys(layer.product_keys, _index(name), keys, (usage or {}).get(_index(name)), noise)
    _check_optimizer(layers, optimizer)
    generator = torch.Generator().manual_seed(seed)
    for name, layer in layers.items():
        index, experts, old = layer.product_keys, layer.experts, layer.product_keys.num_experts
        n = math.isqrt(num_experts)
        fresh = new_sub_keys(
            index, n - index.sub_keys.shape[2], keys, (usage or {}).get(_index(name)), noise, generator
        )
        prepare_rows(experts.rows, None)
        carry = _padded(0, num_experts)
        rows = _appended(experts.rows, num_experts)
        scales = None if experts.scales is None else carry(experts.scales, 0.0)
        fill_new_rows(experts, rows, scales, old, generator)
        experts.scales = scales
        _swap(experts, "rows", rows, optimizer, carry)
        _swap(index, "sub_keys", torch.cat([index.sub_keys, fresh], dim=2), optimizer, _padded(2, n))
        index.num_experts = experts.num_experts = num_experts
        index.grown_from, index.opening = old, torch.zeros((), device=rows.device)
    _record(model, num_experts=num_experts, grown_from=old)
    return model


@torch.no_grad()
def set_opening(model: nn.Module, value: float) -> nn.Module:
    """Let the experts of the last growth in at a prior of `value`, in every PEER layer that has grown.

    A softmax weight is multiplied by it once for each half of an expert that is new, before they are scaled to sum 1;
    with other weightings its logarithm is added to the score. At 0 new experts are left out and get no gradient. At 1
    the layer is one like any other from then on, and can grow again. Returns the model.

    Raises:
        ValueError: `value` is not in 0 .. 1, or below 1 where no layer has grown since its last opening.
    """
    if not 0 <= value <= 1:
        raise ValueError(f"opening is {value}; take a number from 0, closed, to 1, fully open")
    growing = [layer for layer in _peer_layers(model).values() if layer.product_keys.opening is not None]
    if not growing and value < 1:
        raise ValueError(f"opening is {value}, but every layer is fully open: grow(model, num_experts) first")
    for layer in growing:
        index = layer.product_keys
        if value < 1 and index.opening is not None:
            index.opening.fill_(value)
        else:
            index.opening = index.grown_from = None
    if growing and value == 1:
        _record(model, grown_from=None)
    return model


@torch.no_grad()
def to_shells(model: nn.Module, *, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Renumber the experts of every PEER layer of pairing "row-major", so that it can grow; in place, and returned.

    Rows are permuted; each token retrieves the same ones with the same weights, and the output keeps its bits, except
    where experts of exactly equal score stand in for each other. Arguments and errors as those of `grow`.
    """
    layers = _peer_layers(model)
    layers = {name: layer for name, layer in layers.items() if layer.product_keys.pairing != "shells"}
    _check_optimizer(layers, optimizer)
    for layer in layers.values():
        index, experts = layer.product_keys, layer.experts
        n = index.sub_keys.shape[2]
        i, j = PAIRINGS["shells"].sub_keys(torch.arange(n * n), n)
        carry = _permuted(PAIRINGS[index.pairing].ids(i, j, n).to(experts.rows.device))
        prepare_rows(experts.rows, None)
        if experts.scales is not None:
            experts.scales = carry(experts.scales, 0.0)
        _swap(experts, "rows", carry(experts.rows, 0.0), optimizer, carry)
        index.pairing = "shells"
    _record(model, pairing="shells")
    return model


def _peer_layers(model: nn.Module) -> dict[str, PEER]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PEER)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no PEER layer")
    return layers


def _index(name: str) -> str:
    """The name of a layer's index."""
    return f"{name}.product_keys".lstrip(".")


def _check_grows(layer: PEER, name: str, num_experts: int) -> None:
    index = layer.product_keys
    where = f"layer {name!r}" if name else "the layer"
    if index.pairing != "shells":
        raise ValueError(
            f"{where} has pairing {index.pairing!r}, in which growth would move experts: call "
            "peerlm.surgery.to_shells(model) first, or build it with pairing='shells'"
        )
    if index.opening is not None:
        raise ValueError(
            f"{where} grew from {index.grown_from} experts and is open at {index.opening.item():g}: "
            "set_opening(model, 1) before it grows again"
        )
    sub_keys_per_half(num_experts, index.experts_per_head)
    if num_experts <= index.num_experts:
        raise ValueError(f"num_experts is {num_experts}, but {where} has {index.num_experts}; give a larger square")


def _check_optimizer(layers: Mapping[str, PEER], optimizer: torch.optim.Optimizer | None) -> None:
    if optimizer is None:
        return
    for layer in layers.values():
        for parameter in (layer.experts.rows, layer.product_keys.sub_keys):
            if parameter.requires_grad and not holds(optimizer, parameter):
                raise ValueError("the optimizer does not train this model; pass the one that does, or none")
            check_between_steps(optimizer, parameter)


def _appended(rows: Tensor, length: int) -> Tensor:
    """The rows, followed by others that are not initialised."""
    longer = empty_rows(length, *rows.shape[1:], dtype=rows.dtype)
    if longer.device != rows.device:
        longer = torch.empty_like(longer, device=rows.device)
    longer[: len(rows)] = rows
    return longer


def _padded(dim: int, length: int) -> Carry:
    def carry(old: Tensor, value: float) -> Tensor:
        if dim == 0:
            longer = _appended(old, length)
            longer[len(old) :] = value
            return longer
        shape = list(old.shape)
        shape[dim] = length - old.shape[dim]
        return torch.cat([old, old.new_full(shape, value)], dim=dim)

    return carry


def _permuted(order_N: Tensor) -> Carry:
    def carry(old: Tensor, value: float) -> Tensor:
        if old.device.type != "cpu":
            return old.index_select(0, order_N)
        return torch.index_select(old, 0, order_N, out=empty_rows(*old.shape, dtype=old.dtype))

    return carry


def _swap(module: nn.Module, name: str, value: Tensor, optimizer: torch.optim.Optimizer | None, carry: Carry) -> None:
    old = getattr(module, name)
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    setattr(module, name, new)
    if optimizer is not None and holds(optimizer, old):
        replace_parameter(optimizer, old, new, carry)


def _record(model: nn.Module, **changes: Any) -> None:
    """Write PEER's settings that changed, None for those that no longer hold, into a transformers configuration."""
    for settings, write in _settings_of(model):
        write({key: value for key, value in {**settings, **changes}.items() if value is not None or key not in changes})


def _settings_of(model: nn.Module) -> Iterator[tuple[dict[str, Any], Callable[[dict[str, Any]], None]]]:
    """PEER's settings in a model's configuration, where there are any, and how to replace them."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) == "peer":
        yield config.peer or {}, lambda settings: setattr(config, "peer", settings)
    record = conversion_of(model) if hasattr(config, "quantization_config") else None  # type: ignore[arg-type]
    if record is not None:
        yield record.settings, lambda settings: setattr(record, "settings", settings)
