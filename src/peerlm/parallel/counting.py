"""Which rank counts the use of which experts: the one that holds their rows."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor, nn

from peerlm.layers.retrieval_layer import RetrievalLayer
from peerlm.parallel.exchange import padded
from peerlm.parallel.table import ShardedTable


@dataclass(frozen=True)
class RowOwners:
    """The ranks along "rows" of a sharded table, each row of which is an expert; see `peerlm.usage.Owners`."""

    table: ShardedTable

    def num_own(self) -> int:
        """How many experts this rank counts."""
        return len(self.table.rows)

    def own(self, weights: Tensor, expert_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Of all ranks' retrievals (T, P) those of this rank's experts: weights (E,) and their numbers here, (E,)."""
        place = self.table.place
        tokens = place.all.most(len(weights))
        axes = (place.cols, place.rows, place.replica)  # a copy of the table counts the tokens of all copies
        everyone = [padded(each, tokens, -1) for each in (weights, expert_ids)]
        for axis in axes:
            everyone = [axis.gather(each) for each in everyone]
        local = self.table.local(everyone[1])
        mine = local >= 0
        return everyone[0][mine], local[mine]

    def sum(self, local: Tensor) -> Tensor:
        """A number of each rank's experts, summed over all."""
        rows = self.table.place.rows
        if rows.size == 1:
            return local
        total = local.clone()
        dist.all_reduce(total, group=rows.group)
        return total


def count_by_owners(model: nn.Module) -> None:
    """Let `peerlm.usage` count at each rank the experts that it holds, where an expert is a row of a sharded table."""
    for layer in model.modules():
        if not isinstance(layer, RetrievalLayer):
            continue
        for table in layer.children():
            if isinstance(table, ShardedTable) and table.num_rows == layer.product_keys.num_experts:
                layer.product_keys.usage_owners = RowOwners(table)  # type: ignore[assignment]
