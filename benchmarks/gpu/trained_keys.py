"""Queries and sub-keys of a layer that was trained for a moment: they are not spread as drawn ones are."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from peerlm import PEER
from peerlm.optim import RowAdamW, parameter_groups

DIM = 64
KINDS = 128
"""Of tokens, each with a target of its own, so that there is something to retrieve experts for."""
BATCH = 2048


class _Tokens:
    """Tokens of some kinds, and the target of each."""

    def __init__(self) -> None:
        self.centres, self.targets = torch.randn(KINDS, DIM), torch.randn(KINDS, DIM)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        kind = torch.randint(KINDS, (count,))
        return self.centres[kind] + 0.3 * torch.randn(count, DIM), self.targets[kind]


@cache
@torch.enable_grad()
def _trained(heads: int, n: int, half: int, steps: int, device: torch.device) -> tuple[PEER, _Tokens]:
    layer = PEER(DIM, num_experts=n * n, heads=heads, experts_per_head=min(16, n), key_dim=2 * half)
    tokens = _Tokens()
    optimizer = RowAdamW(parameter_groups(layer), lr=1e-2, lazy=True)
    batch = BATCH if device.type == "cuda" else 16
    for _ in range(steps):
        x, target = tokens.draw(batch)
        F.mse_loss(layer(x), target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return layer.eval(), tokens


@torch.no_grad()
def trained_keys(tokens: int, heads: int, n: int, half: int, *, steps: int) -> tuple[Tensor, Tensor]:
    """Queries (T, H, 2 C) of new tokens, and the layer's sub-keys (2, H or 1, n, C), on the default device."""
    layer, source = _trained(heads, n, half, steps, torch.get_default_device())
    x, _ = source.draw(tokens)
    keys = layer.product_keys
    return keys.open_keys(keys.query(x))[0], keys.compared(keys.sub_keys).detach().clone()
