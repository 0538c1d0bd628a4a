"""Room in a cache for tokens to come, so that keys and values are not copied for each of them.

Shape suffixes: B batch, G key and value heads, L tokens, C features.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

LEAST_ROOM = 64
"""Tokens for which there is room after keys and values were copied; or half of what there is, if that is more."""
_ROOM = "peerlm_room"


@dataclass
class _Room:
    """Larger tensors, (B, G, capacity, C), and the views of them that a layer has."""

    all_keys: Tensor
    all_values: Tensor
    keys: Tensor
    values: Tensor


def one_more_column(layer: Any) -> tuple[Tensor, Tensor] | None:
    """Keys and values (B, G, L + 1, C) of a cache's layer, whose last column is to be written; None for other layers.

    They become the layer's by `keep`. A layer may say itself where its columns are, by a method of this name.
    """
    if type(layer) is not DynamicLayer:
        own = getattr(layer, "one_more_column", None)
        found: tuple[Tensor, Tensor] | None = None if own is None else own()
        return found
    keys, values = layer.keys, layer.values
    if not layer.is_initialized or keys is None or values is None or keys.ndim != 4:
        return None
    length = keys.shape[2]
    room: _Room | None = vars(layer).get(_ROOM)
    # Whatever has put others in their place (a cut, another order) has put them elsewhere, or may yet read the rest.
    if room is None or room.keys is not keys or room.values is not values:
        room = None
    if room is None or room.all_keys.shape[2] == length:
        capacity = length + max(LEAST_ROOM, length // 2)
        room = _Room(_with_room(keys, capacity), _with_room(values, capacity), keys, values)
        setattr(layer, _ROOM, room)
    return room.all_keys.narrow(2, 0, length + 1), room.all_values.narrow(2, 0, length + 1)


def keep(layer: Any, keys: Tensor, values: Tensor) -> None:
    """Let a layer have what `one_more_column` gave."""
    room: _Room | None = vars(layer).get(_ROOM)
    if room is not None:
        layer.keys = room.keys = keys
        layer.values = room.values = values


def _with_room(part: Tensor, capacity: int) -> Tensor:
    batch, heads, length, features = part.shape
    larger = part.new_empty(batch, heads, capacity, features)
    larger[:, :, :length] = part
    return larger
