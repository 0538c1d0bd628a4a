"""PEER: a learned index retrieves each token's experts from a pool of single neurons."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from peerlm.layers.checks import check_sizes, flatten_tokens
from peerlm.layers.expert_table import ExpertTable
from peerlm.layers.one_call import Prepared, in_one_call, nobody_looks_on
from peerlm.layers.output_scale import output_std
from peerlm.layers.product_keys import ProductKeys
from peerlm.layers.retrieval_layer import RetrievalLayer
from peerlm.layers.row_map import RowMap, row_map
from peerlm.ops import api


class PEER(RetrievalLayer):
    """Parameter Efficient Expert Retrieval (He 2024, "Mixture of A Million Experts", arXiv 2407.04153).

    A drop-in for a transformer's feed-forward layer: y = sum over heads and retrieved experts of weight *
    act(u . x) * v. The defaults are the paper's. The paper does not state key_dim or the activation.

    Small models learn more from one head of small keys: heads=1, key_dim=32, shared_keys=False, key_norm=True,
    activation="one_plus", weight_scale=256. With these, 16 experts of 512**2 read a quarter of the bytes of 64 of
    256**2 for about the same loss, and 32 of 512**2 have a lower one. Tables and keys then take a quarter of the
    learning rate. docs/frontier.md says which setting for which
    purpose, and when not to use this layer; recipes have these settings as `preset = "few-experts"` and "tuned".

    With a `row_dim` below `dim` experts are narrower than the model: u and v have row_dim entries, and y = W_out sum of
    weight * act(u . W_in x) * v, with two maps that all experts share. So a token reads fewer bytes, and the same
    memory holds more experts. Queries are made of x as it is.

    Args:
        dim: width of input and output.
        num_experts: N, a square number.
        heads: independent queries per token.
        experts_per_head: k, experts that each query retrieves, at most sqrt(num_experts); heads * experts_per_head
            neurons are active per token.
        key_dim: size of a query, even.
        shared_keys: one set of sub-keys for all heads (the paper's text), or one per head (Lample 2019).
        query_norm: "batch", "layer" or "none".
        key_norm: compare queries with sub-keys of one length; see `ProductKeys`.
        weighting: "softmax" over a head's k scores, "sigmoid", "relu", or "none" (the raw score).
        activation: "gelu", "gelu_tanh", "relu", "silu", "identity", or "one_plus": (1 + u . x) v, which starts near a
            memory's value v.
        gated: give experts a gate vector: (u . x) * act(g . x) * v.
        dropout: share of retrieved experts dropped per token in training; the others' weights are scaled up.
        backend: a name in `peerlm.ops.api.BACKENDS`.
        row_format: how experts are stored: "float32", "bfloat16", or "int8" or "float8_e4m3fn", which are
            trained by `experts.train_in_place()` alone, or "int4", which is not trained.
        weight_scale: what weights are multiplied by; 1 is the paper's. Vectors v start smaller by as much, so that
            the output scale at the start is the same; steps of AdamW, whose size is the learning rate, then change
            the output more.
        pairing: the id of the expert of sub-keys i and j: "row-major", i * n + j, or "shells", which a layer needs
            to grow (`peerlm.growth.grow`).
        row_dim: width of the experts' vectors; dim if None.
        grown_from: of a layer that has grown and is not fully open, the number of experts before; see `ProductKeys`.

    Attributes:
        product_keys: the index, `ProductKeys`.
        experts: the rows, `ExpertTable`.
        in_proj, out_proj: the maps W_in (row_dim, dim) and W_out (dim, row_dim); without parameters if row_dim is dim.
        packs: None, or further experts that are retrieved together with these (`peerlm.packs.api`).

    Raises:
        ValueError: a setting is impossible; the message has the setting, its value, and the fix.
    """

    packs: Any

    def __init__(
        self,
        dim: int,
        *,
        num_experts: int = 1024**2,
        heads: int = 8,
        experts_per_head: int = 16,
        key_dim: int = 128,
        shared_keys: bool = True,
        query_norm: str = "batch",
        key_norm: bool = False,
        weighting: str = "softmax",
        activation: str = "gelu",
        gated: bool = False,
        dropout: float = 0.0,
        backend: str = "auto",
        row_format: str = "float32",
        weight_scale: float = 1.0,
        pairing: str = "row-major",
        grown_from: int | None = None,
        row_dim: int | None = None,
    ):
        row_dim = dim if row_dim is None else row_dim
        check_sizes(dim=dim, row_dim=row_dim)
        api.check_activation(activation)
        product_keys = ProductKeys(
            dim,
            num_experts=num_experts,
            heads=heads,
            experts_per_head=experts_per_head,
            key_dim=key_dim,
            shared_keys=shared_keys,
            query_norm=query_norm,
            key_norm=key_norm,
            weighting=weighting,
            pairing=pairing,
            grown_from=grown_from,
            backend=backend,
        )
        super().__init__(product_keys, weight_scale=weight_scale, dropout=dropout)
        self.dim = dim
        self.in_proj, self.out_proj = row_map(dim, row_dim), row_map(row_dim, dim)
        self.experts = ExpertTable(
            num_experts,
            row_dim,
            activation=activation,
            gated=gated,
            backend=backend,
            row_format=row_format,
            up_std=self._initial_up_std(activation),
        )
        self.register_module("packs", None)
        self._prepared = Prepared()

    def reset_parameters(self, output_scale: float = 1.0) -> None:
        """Initialise to an output of a dense FFW's scale (see `output_scale.py`) times `output_scale`.

        Experts of another layer stay as they are; that layer initialises them.
        """
        self.product_keys.reset_parameters()
        for each in (self.in_proj, self.out_proj):
            if isinstance(each, RowMap):
                each.reset_parameters()
        if self.owns_tables:
            self.experts.reset_parameters(output_scale * self._initial_up_std(self.experts.activation))

    def _initial_up_std(self, activation: str) -> float:
        return output_std(self.product_keys.initial_weight_power(), activation) / self.weight_scale

    def retrieve(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights (float32 at least) and expert ids (int64) of x without packs, (..., heads, experts_per_head).

        x, mask, errors: as of `forward`.
        """
        return self.product_keys(x, mask)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map x (..., dim) to (..., dim); the bool `mask` (...) is True at real tokens and False at padding.

        Padding is mapped as well, but does not enter the statistics of a query BatchNorm.

        Raises:
            TypeError: x is not floating point.
            ValueError: its last dimension is not dim, or the mask has not its other ones.
        """
        if (y := in_one_call(self, x, mask)) is not None:
            return y
        x_TD, _ = flatten_tokens(x, mask, self.dim)
        packs = self.packs
        weights, expert_ids = self.retrieve(x, mask) if packs is None else packs(x, mask, self.product_keys)
        mix = self.experts if packs is None else partial(packs.mix, self.experts)
        y_TD = self.out_proj(mix(self.in_proj(x_TD), *self.per_token(weights, expert_ids)))
        return y_TD.to(x.dtype).view(x.shape)

    def few_tokens_call(self) -> Callable[[Tensor], Tensor | None] | None:
        """What maps a few tokens (..., dim) in one call, without gradients and where nothing else looks on; or None.

        It depends on what `one_call.Unchanged` sees of the layer and its parts.
        """
        if self.training or self._modules["packs"] is not None:
            return None
        experts, product_keys = self.experts, self.product_keys
        if experts.dim != self.dim:
            return None
        of_index, of_experts = product_keys.one_call(), experts.one_call()
        if of_index is None or of_experts is None or not nobody_looks_on(experts, *of_index[1]):
            return None
        prepared = self._prepared
        state = of_index[0], of_experts, self.weight_scale
        if prepared.state != state:
            prepared.call = experts.whole_layer(weight_scale=self.weight_scale, **product_keys.of_one_call())
            prepared.state = state
        return prepared.call

    @property
    def parameters_per_expert(self) -> int:
        """The vectors u and v and, gated, g."""
        return (3 if self.experts.gated else 2) * self.experts.dim
