"""What layers share whose rows an index of product keys retrieves: weights, dropout, and what a token costs."""

import torch.nn.functional as F
from torch import Tensor, nn

from peerlm.layers.checks import check_dropout, check_weight_scale
from peerlm.layers.product_keys import ProductKeys
from peerlm.layers.table import Table


class RetrievalLayer(nn.Module):
    """An index, and what its weights go through before they multiply rows; subclasses have the rows.

    Args:
        product_keys: the index.
        weight_scale: what weights are multiplied by.
        dropout: share of retrieved experts dropped per token in training; the others' weights are scaled up.
    """

    def __init__(self, product_keys: ProductKeys, *, weight_scale: float, dropout: float = 0.0):
        super().__init__()
        check_weight_scale(weight_scale)
        check_dropout(dropout)
        self.weight_scale = weight_scale
        self.dropout = dropout
        self.product_keys = product_keys

    @property
    def parameters_per_expert(self) -> int:
        """Numbers in the rows of one expert, each of which a token that retrieves it multiplies once."""
        raise NotImplementedError

    def per_token(self, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Weights, scaled and thinned by dropout, and ids of an index, (..., heads, k), both as (T, heads * k)."""
        weights = F.dropout(weights * self.weight_scale, self.dropout, self.training)
        per_token = self._experts_per_token
        return weights.reshape(-1, per_token), ids.reshape(-1, per_token)

    @property
    def _experts_per_token(self) -> int:
        return self.product_keys.heads * self.product_keys.experts_per_head

    def extra_flops_per_token(self, context: int) -> int:
        """Forward FLOPs of the retrieved experts; the index counts itself."""
        return 2 * self.parameters_per_expert * self._experts_per_token

    def inactive_parameters(self) -> int:
        """Parameters of the experts that one token does not retrieve."""
        num_experts = self.product_keys.num_experts
        return self.parameters_per_expert * (num_experts - min(self._experts_per_token, num_experts))

    def looked_up_rows(self) -> list[tuple[Table, int]]:
        """This layer's tables, and how many rows of each a token looks up: those of its experts."""
        num_experts = self.product_keys.num_experts
        tables = [table for table in self.children() if isinstance(table, Table)]
        return [(table, self._experts_per_token * (table.num_rows // num_experts)) for table in tables]
