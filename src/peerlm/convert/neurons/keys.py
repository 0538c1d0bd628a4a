"""The index of a feed-forward layer's neurons: each token's best of them by product keys, each neuron at most once.

Shape suffixes: T tokens, H heads, n sub-keys per half, N = H n n neurons, K retrieved per token.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from peerlm.convert.neurons.retrieving import RetrievingNeurons
from peerlm.layers.checks import check_sizes, flatten_tokens
from peerlm.ops import api
from peerlm.ops.scoring import half_scores, top_k


class NeuronKeys(RetrievingNeurons):
    """Retrieve the `retrieved` best of heads * n * n neurons for every token.

    Heads own disjoint neurons: neuron id = head * n * n + i * n + j scores q_head[:key_dim / 2] . c_head,i + q_head[
    key_dim / 2:] . c'_head,j, and the best of all heads together are retrieved. So no neuron comes twice, and any share
    may be asked for. `ProductKeys` does not offer this: it gives at most n per head, and heads may repeat each other.
    More heads are a finer index, and a costlier one.

    Weights are 1, so that a retrieved neuron is what it was in the dense layer. Their gradient is that of a sigmoid of
    how far the score lies above the lowest one retrieved (straight-through; Bengio 2013, arXiv 1308.3432): if a
    neuron's output serves the loss its score rises, and most for neurons that nearly were not retrieved.

    Args:
        dim: width of the input.
        sub_keys: n.
        heads: H.
        retrieved: K, 1 to N.
        key_dim: size of a head's query, even.
        backend: a name in `peerlm.ops.api.BACKENDS`.

    Attributes:
        num_experts: N.
        sub_keys: (2, heads, n, key_dim / 2).

    Raises:
        ValueError: a setting is impossible; the message has the setting, its value, and the fix.
    """

    parameter_roles: ClassVar[dict[str, str]] = {"sub_keys": "keys"}

    def __init__(self, dim: int, *, sub_keys: int, heads: int, retrieved: int, key_dim: int, backend: str = "auto"):
        super().__init__()
        check_sizes(dim=dim, sub_keys=sub_keys, heads=heads, key_dim=key_dim)
        api.check_backend(backend)
        if key_dim % 2:
            raise ValueError(f"key_dim is {key_dim}; it is split into two halves, so take an even number of at least 2")
        self.dim = dim
        self.heads = heads
        self.key_dim = key_dim
        self.num_experts = heads * sub_keys**2
        self.backend = backend
        self.retrieved = retrieved
        self.query_proj = nn.Linear(dim, heads * key_dim)
        self.sub_keys = nn.Parameter(torch.empty(2, heads, sub_keys, key_dim // 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A random index: queries of unit variance for such inputs, half scores of variance 1/3 (Lample 2019)."""
        nn.init.normal_(self.query_proj.weight, std=self.dim**-0.5)
        nn.init.zeros_(self.query_proj.bias)
        bound = (self.key_dim // 2) ** -0.5
        nn.init.uniform_(self.sub_keys, -bound, bound)

    def scores(self, x: Tensor) -> Tensor:
        """Scores (T, N) of all neurons for x (..., dim), in float32 at least."""
        first_THn, second_THn = half_scores(self._query(x), self.sub_keys)
        return (first_THn[..., :, None] + second_THn[..., None, :]).flatten(1)

    def _query(self, x: Tensor) -> Tensor:
        """Queries (T, heads, key_dim) of x (..., dim), which the map gets as it is: see `ProductKeys`."""
        return self.query_proj(x).reshape(-1, self.heads, self.key_dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights, all 1 (float32 at least), and neuron ids (int64), each (..., 1, K), best first; no id comes twice.

        Every token on its own, so `mask` changes nothing.
        """
        flatten_tokens(x, mask, self.dim)  # which checks them
        n = self.sub_keys.shape[2]
        if self.retrieved <= n:
            scores_THK, ids_THK = api.retrieve(
                self._query(x), self.sub_keys, self.retrieved, weighting="none", backend=self.backend
            )
            offsets_H1 = torch.arange(self.heads, device=x.device)[:, None] * n**2
            scores_TX, ids_TX = scores_THK.flatten(1), (ids_THK + offsets_H1).flatten(1)
        else:  # a sum of two numbers for each neuron, next to the 4 * dim FLOPs or more of the dense layer
            scores_TX, ids_TX = self.scores(x), None
        with torch.no_grad():
            _, best_TK = top_k(scores_TX, self.retrieved)
        scores_TK = scores_TX.gather(-1, best_TK)
        ids_TK = best_TK if ids_TX is None else ids_TX.gather(-1, best_TK)
        shape = (*x.shape[:-1], 1, self.retrieved)
        return _ones_with_gradient(scores_TK).reshape(shape), ids_TK.reshape(shape)

    def extra_flops_per_token(self, context: int) -> int:
        """Forward FLOPs of scoring each head's query against its 2 n sub-keys; the query map counts itself."""
        return 2 * self.heads * self.sub_keys.shape[2] * self.key_dim

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        return f"num_experts={self.num_experts}, heads={self.heads}, retrieved={self.retrieved}, key_dim={self.key_dim}"


def _ones_with_gradient(scores_TK: Tensor) -> Tensor:
    """Ones, exactly, whose gradient is that of a sigmoid of the scores above each token's lowest."""
    if not (torch.is_grad_enabled() and scores_TK.requires_grad):
        return torch.ones_like(scores_TK)
    soft_TK = torch.sigmoid(scores_TK - scores_TK[:, -1:].detach())
    return 1 + (soft_TK - soft_TK.detach())
