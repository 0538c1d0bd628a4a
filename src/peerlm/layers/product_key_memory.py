"""Product-key memory: PEER's index, but what it retrieves are vectors."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from peerlm.layers.output_scale import input_std, output_std
from peerlm.layers.product_keys import ProductKeys, sub_keys_per_half
from peerlm.layers.retrieval_layer import RetrievalLayer
from peerlm.layers.table import Table


class ProductKeyMemory(RetrievalLayer):
    """Product-key memory (Lample 2019, arXiv 1907.05242): PEER's index, but what it retrieves are vectors.

    With `gated` it is Memory+ (Berges 2024, arXiv 2412.09764): y = W_out (m * silu(W_gate x)), where m is the weighted
    sum of values. Its layers have one pool of values, as `share_tables` of a model gives them, and a learning rate of
    values ten times that of the rest.

    Args:
        dim: width of input and output.
        num_values: N, a square number.
        heads: independent queries per token.
        values_per_head: k, values that each query retrieves.
        key_dim: size of a query, even.
        shared_keys: one set of sub-keys for all heads, or one per head (the paper's).
        query_norm: "batch", "layer" or "none".
        key_norm: as in PEER.
        weighting: "softmax", "sigmoid", "relu" or "none".
        backend: a name in `peerlm.ops.api.BACKENDS`.
        weight_scale: what weights are multiplied by, as in PEER; 1 is the paper's.
        pairing, grown_from: as in PEER.
        gated: whether values go through a gate by the input, and a map.

    Attributes:
        product_keys: the index, `ProductKeys`.
        values: the rows, a `Table` of (dim,).
        gate_proj, out_proj: the maps W_gate and W_out, (dim, dim); None if not gated.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_values: int = 512**2,
        heads: int = 4,
        values_per_head: int = 32,
        key_dim: int = 256,
        shared_keys: bool = False,
        query_norm: str = "batch",
        key_norm: bool = False,
        weighting: str = "softmax",
        backend: str = "auto",
        weight_scale: float = 1.0,
        pairing: str = "row-major",
        grown_from: int | None = None,
        gated: bool = False,
    ):
        sub_keys_per_half(num_values, values_per_head, names=("num_values", "values_per_head"))
        product_keys = ProductKeys(
            dim,
            num_experts=num_values,
            heads=heads,
            experts_per_head=values_per_head,
            key_dim=key_dim,
            shared_keys=shared_keys,
            query_norm=query_norm,
            key_norm=key_norm,
            weighting=weighting,
            pairing=pairing,
            grown_from=grown_from,
            backend=backend,
        )
        super().__init__(product_keys, weight_scale=weight_scale)
        self.dim = dim
        self.values = Table(num_values, dim, backend=backend)
        self.gated = gated
        self.gate_proj, self.out_proj = (nn.Linear(dim, dim, bias=False) if gated else None for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self, output_scale: float = 1.0) -> None:
        """The index by its own rule, the values, unless another layer owns them, by `output_scale.py`, times that.

        If gated, the sum of values has unit mean square, and W_out the output scale.
        """
        self.product_keys.reset_parameters()
        power = self.product_keys.initial_weight_power()
        std = output_scale * output_std(power)
        if self.gate_proj is not None and self.out_proj is not None:
            nn.init.normal_(self.gate_proj.weight, std=input_std(self.dim, "silu"))
            nn.init.normal_(self.out_proj.weight, std=output_scale * output_std(self.dim, "silu"))
            std = power**-0.5
        if self.owns_tables:
            self.values.fill_normal(std / self.weight_scale)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map x (..., dim) to (..., dim); padding (mask False) does not enter the query norm's statistics."""
        y = self.values.mix(*self.per_token(*self.product_keys(x, mask))).to(x.dtype).view(x.shape)
        if self.gate_proj is None or self.out_proj is None:
            return y
        gated: Tensor = self.out_proj(y * F.silu(self.gate_proj(x)))
        return gated.to(x.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """As in `nn.Module`; values may have the name that they had before they were a table."""
        earlier = f"{prefix}values"
        if earlier in state_dict:
            state_dict[f"{prefix}values.rows"] = state_dict.pop(earlier)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    @property
    def parameters_per_expert(self) -> int:
        """The value."""
        return self.dim
