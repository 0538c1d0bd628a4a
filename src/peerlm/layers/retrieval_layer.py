"""What layers share whose rows an index of product keys retrieves: weights, dropout, and what a token costs."""

import copy

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
        """Parameters of the experts that one token does not retrieve, in any of the layers that share them."""
        if not self.owns_tables:
            return 0
        num_experts, users = self.product_keys.num_experts, self.tables()[0].users
        return self.parameters_per_expert * (num_experts - min(users * self._experts_per_token, num_experts))

    def looked_up_rows(self) -> list[tuple[Table, int]]:
        """The tables of this layer, and how many rows of each a token looks up: those of its experts."""
        num_experts = self.product_keys.num_experts
        return [(table, self._experts_per_token * (table.num_rows // num_experts)) for table in self.tables()]

    def tables(self) -> list[Table]:
        """The tables in which tokens look rows up, also where another layer owns them."""
        return [each for each in (*self.children(), *vars(self).values()) if isinstance(each, Table)]

    @property
    def owns_tables(self) -> bool:
        """Whether tables are part of this layer, and not those of another one (`share_tables_of`)."""
        return any(isinstance(each, Table) for each in self.children())

    def share_tables_of(self, owner: "RetrievalLayer") -> None:
        """Look rows up in another layer's tables from now on, by the own index; the own tables go.

        The other layer owns them: a state dict has them once, and so does `parameters()`. Both must stay parts of one
        model. Their gradients are those of all layers that look rows up.

        Raises:
            ValueError: the layers differ in kind or in the shape, number, format or use of their rows, or this layer
                shares tables already.
        """
        if owner is self or not owner.owns_tables or any(table.users > 1 for table in self.tables()):
            raise ValueError("the layers share tables already; let each share those of the first one, once")
        if type(self) is not type(owner) or list(map(_what_it_is, self.tables())) != list(
            map(_what_it_is, owner.tables())
        ):
            ours, theirs = (f"{type(each).__name__}: {', '.join(map(str, each.tables()))}" for each in (self, owner))
            raise ValueError(f"tables can be shared by layers that are alike; these are {ours} and {theirs}")
        for name, table in list(self.named_children()):
            if isinstance(table, Table):
                delattr(self, name)
                shared = getattr(owner, name)
                shared.users += 1
                vars(self)[name] = shared  # not as a module, which would be a part of both layers

    def own_tables(self) -> None:
        """Have a copy of each table that another layer owns; in a model set `share_tables` of its configuration too."""
        for name, table in list(vars(self).items()):
            if isinstance(table, Table):
                del vars(self)[name]
                table.users -= 1
                own = copy.deepcopy(table)
                own.users = 1
                setattr(self, name, own)


def _what_it_is(table: Table) -> tuple[object, ...]:
    """What must be alike in tables of layers that share them."""
    settings = (getattr(table, name, None) for name in ("activation", "gated"))
    return type(table), table.num_rows, table.row_shape, table.dtype, table.backend, *settings
