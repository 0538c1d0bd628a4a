"""A small language model around the layers that are compared, of torch alone: it runs where transformers is not."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Causal attention with rotary positions."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.dim = dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        y = F.scaled_dot_product_attention(_rotated(q), _rotated(k), v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))

    def extra_flops_per_token(self, context: int) -> int:
        """Forward FLOPs of scores and sums over a full context."""
        return 4 * context * self.dim


def _rotated(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    position = torch.arange(x.shape[-2], device=x.device)[:, None]
    angle = position * 10000.0 ** (-torch.arange(half, device=x.device) / half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Decoder(nn.Module):
    """Pre-norm blocks of attention and a feed-forward layer; the output head is the embedding.

    Args:
        vocabulary: number of ids.
        dim: width.
        heads: of attention.
        layers: what makes each block's feed-forward layer.
    """

    def __init__(self, vocabulary: int, dim: int, heads: int, layers: list[Callable[[], nn.Module]]):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        self.head.weight = self.embedding.weight
        self.attention = nn.ModuleList(Attention(dim, heads) for _ in layers)
        self.ffw = nn.ModuleList(make() for make in layers)
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(2 * len(layers) + 1))
        scale = (2 * len(layers)) ** -0.5
        for attention, ffw in zip(self.attention, self.ffw, strict=True):
            nn.init.normal_(attention.out.weight, std=scale * dim**-0.5)
            ffw.reset_parameters(scale)

    def forward(self, ids: Tensor) -> Tensor:
        """Mean loss of the next id, of ids (B, S)."""
        x = self.embedding(ids[:, :-1])
        for block, (attention, ffw) in enumerate(zip(self.attention, self.ffw, strict=True)):
            x = x + attention(self.norms[2 * block](x))
            x = x + ffw(self.norms[2 * block + 1](x))
        logits = self.head(self.norms[-1](x))
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
