"""The packs beside one feed-forward layer of a model that has no experts: each retrieves for itself, behind a gate."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peerlm.layers import PEER, Table
from peerlm.packs.choice import tokens_of
from peerlm.packs.gate import Gate

CHILD = "packs"
"""The name of `PacksBeside`, below that at the path of a feed-forward layer."""
DEFAULTS: dict[str, Any] = {
    "heads": 4,
    "experts_per_head": 8,
    "key_dim": 8,
    "activation": "gelu",
    "query_norm": "layer",
}
"""Settings of the PEER layers of a pack, where others are not given."""


class PackBeside(nn.Module):
    """What a pack adds to one feed-forward layer: `gate(x) * peer(x)`.

    Args:
        dim: width of the hidden states.
        settings: of `peerlm.layers.PEER`.

    Attributes:
        ffw_power: mean square of what the feed-forward layer writes, where the pack was made; otherwise 1.
        foreign: what the layer reads of foreign tokens that open the gate, (tokens, dim), in the process that fitted
            it; otherwise None.
    """

    def __init__(self, dim: int, settings: Mapping[str, Any]):
        super().__init__()
        self.settings = {name: value for name, value in settings.items() if name != "num_experts"}
        self.ffw_power = 1.0
        self.foreign: Tensor | None = None
        self.gate = Gate(dim)
        self.peer = PEER(dim, **settings)

    @property
    def table(self) -> Table:
        """The rows."""
        return self.peer.experts

    @property
    def size(self) -> int:
        """Experts."""
        return self.peer.product_keys.num_experts

    def tensors(self) -> dict[str, Tensor]:
        """What a file has of it, by name."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.state_dict().items()}

    def forward(self, x_TD: Tensor, allowed_T: Tensor | None) -> Tensor | None:
        """X (T, dim), for which tokens it counts (None: all) -> (T, dim); None where the pack is silent throughout."""
        gate_T = self.gate(x_TD)
        if allowed_T is not None:
            gate_T = gate_T.masked_fill(~allowed_T, 0.0)
        x_TD = x_TD.to(self.peer.product_keys.sub_keys.dtype)
        if torch.compiler.is_compiling():  # shapes may not depend on values
            return torch.where(gate_T[:, None] > 0, gate_T[:, None] * self.peer(x_TD), 0.0)
        (tokens,) = gate_T.nonzero(as_tuple=True)
        if not len(tokens):
            if not (self.training and torch.is_grad_enabled()):
                return None
            tokens = torch.zeros(1, dtype=torch.long, device=x_TD.device)  # a loss needs a graph; the gate is 0 there
        if len(tokens) == len(x_TD):
            return gate_T[:, None] * self.peer(x_TD)
        added = gate_T[tokens, None] * self.peer(x_TD[tokens])
        return torch.zeros_like(x_TD).index_add(0, tokens, added)


class PacksBeside(nn.Module):
    """All packs beside one feed-forward layer; they stand for nothing in a state dict, and add up in order of names.

    Args:
        dim: width of the hidden states.
        first: the path of the map that reads, of a feed-forward layer that is spread over its block; otherwise None.
    """

    def __init__(self, dim: int, first: str | None):
        super().__init__()
        self.dim = dim
        self.first = first
        self.register_load_state_dict_pre_hook(_note_missing)
        self.register_load_state_dict_post_hook(_drop_missing)
        self._missing: list[str] = []

    def by_name(self) -> dict[str, PackBeside]:
        """The packs in the order of names."""
        found = {name.removeprefix("pack_"): pack for name, pack in self._modules.items()}
        return {name: found[name] for name in sorted(found)}  # type: ignore[misc]

    def put(self, name: str, pack: PackBeside) -> None:
        """Add a pack."""
        self.add_module(f"pack_{name}", pack.train(self.training))

    def take(self, name: str) -> None:
        """Remove a pack."""
        delattr(self, f"pack_{name}")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """What all packs add to a layer that reads x (..., dim); None where none says anything."""
        x_TD = x.reshape(-1, self.dim)
        y_TD: Tensor | None = None
        packs = self.by_name()
        active, allowed = tokens_of(self, x, list(packs))
        for name, allowed_T in zip(active, allowed, strict=True):
            part = packs[name](x_TD, allowed_T)
            if part is not None:
                y_TD = part if y_TD is None else y_TD + part
        return None if y_TD is None else y_TD.view(x.shape)

    def state_dict(self, *arguments: Any, destination: Any = None, **options: Any) -> Any:
        """Nothing: packs are saved by themselves (`peerlm.packs.api.save_pack`)."""
        return {} if destination is None else destination


def _note_missing(module: PacksBeside, state: Any, prefix: str, metadata: Any, strict: bool, *lists: list[str]) -> None:
    module._missing = list(lists[0])


def _drop_missing(module: PacksBeside, incompatible: Any) -> None:
    """A state dict of the model has no packs, and none are missed."""
    incompatible.missing_keys[:] = module._missing
