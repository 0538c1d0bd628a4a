"""The layers that an inspection looks into, seen alike: PEER layers, and product-key memories.

Shape suffixes: T tokens, P = heads * experts_per_head experts of a token, N experts, n = sqrt(N), D model width.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peerlm.errors import UserError, listed
from peerlm.growth.indexed import IndexedLayer, indexed_layers
from peerlm.layers import PEER, ProductKeyMemory
from peerlm.ops.functions import ACTIVATIONS
from peerlm.ops.pairing import PAIRINGS
from peerlm.packs.beside import PackBeside

GATHERED_NUMBERS = 2**24
"""Entries of rows that are gathered at a time: 64 MiB in float32."""


@dataclass(frozen=True, kw_only=True)
class InspectedLayer(IndexedLayer):
    """One layer whose experts are looked at. An expert adds `strength * v` to the layer's output.

    In PEER the strength is weight * act(u . x), gated: weight * (u . x) * act(g . x); in product-key memory, whose
    experts are its values, it is the weight. `weight_scale` is part of the weight, and so is the gate of a pack.
    """

    number: int
    """By which a user names the layer; see `find_inspected_layers`."""
    pack: PackBeside | None = None
    """The part of a pack whose layer this is, behind a gate; otherwise None."""

    @property
    def kind(self) -> str:
        """What the layer is called: "PEER", "PEER of a pack" or "product-key memory"."""
        if self.pack is not None:
            return "PEER of a pack"
        return "PEER" if isinstance(self.module, PEER) else "product-key memory"

    @property
    def num_experts(self) -> int:
        """N."""
        return self.index.num_experts

    @property
    def sub_keys(self) -> int:
        """n, sub-keys of each half."""
        return int(self.index.sub_keys.shape[2])

    def pairs(self, expert_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The sub-keys (i, j) of experts, int64 of any shape."""
        return PAIRINGS[self.index.pairing].sub_keys(expert_ids, self.sub_keys)

    @torch.no_grad()
    def activations(self, x_TD: Tensor, ids_TP: Tensor) -> Tensor:
        """What the weight is multiplied by, (T, P): act(u . x) in PEER, 1 in product-key memory."""
        if isinstance(self.module, ProductKeyMemory):
            return torch.ones(ids_TP.shape, device=x_TD.device)
        table = self.module.experts
        act = ACTIVATIONS[table.activation]
        x_TD = _mapped(self.module.in_proj, x_TD)
        parts = []
        tokens = max(1, GATHERED_NUMBERS // (ids_TP.shape[1] * x_TD.shape[1]))
        for x, ids in zip(x_TD.split(tokens), ids_TP.split(tokens), strict=True):
            hidden = self._products(x, ids, 0)
            parts.append(hidden * act(self._products(x, ids, 2)) if table.gated else act(hidden))
        return torch.cat(parts)

    def _products(self, x_TD: Tensor, ids_TP: Tensor, part: int) -> Tensor:
        vectors = self._gathered(ids_TP, part)
        return torch.einsum("td,tpd->tp", x_TD.to(vectors.dtype), vectors)

    @torch.no_grad()
    def vectors(self, expert_ids: Tensor) -> Tensor:
        """What experts add to the layer's output at strength 1, v or W_out v: (..., D), in float32 at least."""
        vectors = self._gathered(expert_ids, 1)
        return _mapped(self.module.out_proj, vectors) if isinstance(self.module, PEER) else vectors

    def _gathered(self, ids: Tensor, part: int) -> Tensor:
        """Vectors u (0), v (1) or g (2) of experts, with the scales of 8-bit rows."""
        return self.table.gather(ids) if isinstance(self.module, ProductKeyMemory) else self.table.gather(ids, part)

    def norms(self) -> Tensor:
        """Length of what each expert adds at strength 1, (N,) float32 on the CPU; the table is read in parts."""
        step = max(1, GATHERED_NUMBERS // self.module.dim)
        device = self.index.sub_keys.device
        ids = torch.arange(self.num_experts, device=device).split(step)
        return torch.cat([self.vectors(part).norm(dim=-1).float().cpu() for part in ids])


def _mapped(row_map: nn.Module, vectors: Tensor) -> Tensor:
    """Vectors through a map of a layer, which may have another dtype, in float32 at least."""
    weight = next(row_map.parameters(), vectors)
    mapped: Tensor = row_map(vectors.to(weight.dtype))
    return mapped.to(torch.promote_types(mapped.dtype, torch.float32))


def find_inspected_layers(model: nn.Module) -> list[InspectedLayer]:
    """The PEER layers and product-key memories of a model, in its order.

    A layer's number is the first number in its module's path, the block's; where these are missing or not distinct,
    layers are counted from 0. Packs beside feed-forward layers are such layers. Raises UserError where there are none,
    values go through a gate, or packs are loaded into PEER layers.
    """
    found = indexed_layers(model)
    if not found:
        raise UserError(
            f"{type(model).__name__} has no PEER layer and no product-key memory, so that there are no experts to look "
            "at; name a model that has one, a pack with --pack, or `peerlm convert` it"
        )
    for layer in found:
        if isinstance(layer.module, ProductKeyMemory) and layer.module.gated:
            raise UserError(
                f"the values of {layer.name} go through a gate, so that what one adds depends on the token: inspect a "
                "model of PEER or of memories with gated = false"
            )
        if isinstance(layer.module, PEER) and layer.module.packs is not None:
            raise UserError(
                f"{layer.name} has packs, whose experts share its places with its own: inspect the model without them"
            )
    blocks = [re.search(r"(?:^|\.)(\d+)(?:\.|$)", layer.name) for layer in found]
    numbers = [int(match[1]) for match in blocks if match]
    if len(set(numbers)) < len(found):
        numbers = list(range(len(found)))
    packs: dict[nn.Module, PackBeside] = {
        module.peer: module for module in model.modules() if isinstance(module, PackBeside)
    }
    return [
        InspectedLayer(number=number, name=layer.name, module=layer.module, pack=packs.get(layer.module))
        for number, layer in zip(numbers, found, strict=True)
    ]


def find_inspected_layer(layers: list[InspectedLayer], wanted: int | str, expert: int) -> InspectedLayer:
    """The layer of this number or name; raises UserError where there is none, or it has no such expert."""
    for layer in layers:
        if wanted in (layer.number, layer.name):
            if not 0 <= expert < layer.num_experts:
                raise UserError(f"expert is {expert}; layer {wanted} has experts 0 to {layer.num_experts - 1}")
            return layer
    known = listed(f"{layer.number} ({layer.name})" for layer in layers)
    raise UserError(f"layer is {wanted!r}; the layers with experts are {known}")


def chunks(tensor: Tensor, numbers_per_row: int) -> Iterator[Tensor]:
    """Parts of a tensor along its first dimension, so that rows of so many numbers stay within 64 MiB."""
    return iter(tensor.split(max(1, GATHERED_NUMBERS // numbers_per_row)))
