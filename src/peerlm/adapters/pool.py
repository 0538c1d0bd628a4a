"""A pool of low-rank experts that each token retrieves by product keys: what a retrieved adapter adds to a module."""

import torch
from torch import Tensor

from peerlm.layers.checks import check_sizes, flatten_tokens
from peerlm.layers.product_keys import ProductKeys
from peerlm.layers.retrieval_layer import RetrievalLayer
from peerlm.layers.row_map import row_map
from peerlm.layers.table import Table
from peerlm.ops import api
from peerlm.ops.functions import ACTIVATIONS


class AdapterPool(RetrievalLayer):
    """N experts of rank r, of which a token retrieves heads * experts_per_head: the sum that a module's output gains.

    y = weight_scale * sum over heads and retrieved experts i of weight_i * sum over j < r of act(u_ij . x) v_ij. With
    activation "identity" an expert is a LoRA of rank r (Hu 2021, arXiv 2106.09685), of rank 1 it is one neuron of
    PEER (He 2024, arXiv 2407.04153, section 2.1). The neurons of an expert share its key. All v are zero at the start,
    and so is y, unless told otherwise.

    u and v lie in tables of their own, because a linear map may write another width than it reads. With a `row_dim`
    both have that width, and all experts share two maps: y = W_out sum of weight_i act(u_ij . W_in x) v_ij.

    Args:
        in_features: width of x.
        out_features: width of y.
        num_experts: N, a square number.
        heads: independent queries per token.
        experts_per_head: k, experts that each query retrieves.
        key_dim: size of a query, even.
        rank: r, neurons per expert.
        activation: "identity", "gelu", "gelu_tanh", "relu" or "silu".
        shared_keys: one set of sub-keys for all heads, or one per head.
        query_norm: "layer", "batch" or "none". No mask of padding reaches a linear layer, so that with "batch"
            padding enters the statistics of training batches.
        weighting: "softmax" over a head's k scores, "sigmoid", "relu", or "none" (the raw score).
        weight_scale: what weights are multiplied by; AdamW's steps, whose size is the learning rate, change the output
            by as much more.
        dropout: share of retrieved experts dropped per token in training; the others' weights are scaled up.
        init_weights: whether all v are zero at the start; otherwise they are random.
        backend: a name in `peerlm.ops.api.BACKENDS`.
        row_dim: width of u and v; None for in_features and out_features, without maps.

    Attributes:
        in_proj, out_proj: the maps W_in and W_out; without parameters where there are none.
        product_keys: the index, `ProductKeys`.
        down, up: u and v, a `Table` each of N * rank rows; expert i has rows i * rank up to (i + 1) * rank.

    Raises:
        ValueError: a setting is impossible; the message has the setting, its value, and the fix.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_experts: int,
        heads: int,
        experts_per_head: int,
        key_dim: int,
        rank: int = 1,
        activation: str = "identity",
        shared_keys: bool = False,
        query_norm: str = "layer",
        weighting: str = "softmax",
        weight_scale: float = 1.0,
        dropout: float = 0.0,
        init_weights: bool = True,
        backend: str = "auto",
        row_dim: int | None = None,
    ):
        check_sizes(in_features=in_features, out_features=out_features, rank=rank)
        reads, writes = (in_features, out_features) if row_dim is None else (row_dim, row_dim)
        check_sizes(row_dim=reads)
        api.check_activation(activation)
        product_keys = ProductKeys(
            in_features,
            num_experts=num_experts,
            heads=heads,
            experts_per_head=experts_per_head,
            key_dim=key_dim,
            shared_keys=shared_keys,
            query_norm=query_norm,
            weighting=weighting,
            backend=backend,
        )
        super().__init__(product_keys, weight_scale=weight_scale, dropout=dropout)
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.activation = activation
        self.in_proj, self.out_proj = row_map(in_features, reads), row_map(writes, out_features)
        self.down = Table(num_experts * rank, reads, backend=backend)
        self.down.fill_normal(reads**-0.5)
        self.up = Table(num_experts * rank, writes, backend=backend)
        self.up.fill_normal(0.0 if init_weights else writes**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in_features) of any float dtype to (..., out_features), computed in the dtype of the pool."""
        x_TD, _ = flatten_tokens(x, None, self.in_features)
        x_TD = x_TD.to(self.product_keys.query_proj.weight.dtype)
        with torch.autocast(x.device.type, enabled=False):  # rounded queries would retrieve other experts
            retrieved = self.product_keys(x_TD)
        weights_TP, row_ids_TP = self.per_token(*retrieved)
        if self.rank > 1:
            neurons = torch.arange(self.rank, device=x.device)
            row_ids_TP = (row_ids_TP[..., None] * self.rank + neurons).flatten(1)
            weights_TP = weights_TP.repeat_interleave(self.rank, dim=1)
        hidden_TP = ACTIVATIONS[self.activation](self.down.dot(self.in_proj(x_TD), row_ids_TP))
        y_TD = self.out_proj(self.up.mix(weights_TP.to(hidden_TP.dtype) * hidden_TP, row_ids_TP))
        return y_TD.view(*x.shape[:-1], self.out_features)

    @property
    def parameters_per_expert(self) -> int:
        """The vectors u and v of each of its neurons."""
        return self.rank * (self.down.row_shape[0] + self.up.row_shape[0])

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"activation={self.activation!r}, weight_scale={self.weight_scale}"
        )
