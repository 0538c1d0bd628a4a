"""What is worth a number in the log of a sharded run: how evenly tables are used, and bytes on the way."""

from typing import Any

import torch
from torch import nn

from peerlm.parallel.models import place_of
from peerlm.parallel.table import sharded_tables


@torch.no_grad()
def since_last(model: nn.Module, tokens: float) -> dict[str, Any]:
    """Of the training passes since the last call; every rank must call it.

    tokens: of each rank in these passes.

    Returns:
        "load": for each table by its path the most entries that a rank along "rows" looked up, over their mean: 1 is
        even. "received_bytes_per_token": what this rank received of others, over its tokens.
    """
    place, tables = place_of(model), sharded_tables(model)
    received, place.traffic.received = place.traffic.received, 0
    if not tables:
        return {"load": {}, "received_bytes_per_token": received / tokens}
    own = torch.stack([table.entries for table in tables.values()])
    by_rank = place.rows.gather(own[None]).double()
    place.traffic.received = 0
    for table in tables.values():
        table.entries.zero_()
    uneven = (by_rank.amax(0) / by_rank.mean(0).clamp(min=1)).tolist()
    return {
        "load": dict(zip(tables, uneven, strict=True)),
        "received_bytes_per_token": received / tokens,
    }
