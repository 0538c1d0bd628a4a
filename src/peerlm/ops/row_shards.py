"""Which part of a table a parameter holds, for those who train it without knowing how tables are cut."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_SHARD = "_peerlm_row_shard"


@dataclass(frozen=True, kw_only=True)
class RowShard:
    """The rows and columns of a table that one rank holds as a parameter (n, *X, width of the part)."""

    group: "dist.ProcessGroup | None"
    """The ranks that together hold the table once; None for this rank alone."""
    firsts: Tensor
    """(S,) int64 on the CPU, ascending from 0: from each of these on rows lie one after another in the table, too."""
    shifts: Tensor
    """(S,) int64 on the CPU: what turns numbers of these rows into numbers of the table's."""
    column: int
    """Number of the first column."""
    width: int
    """How many columns the table has."""
    copies: int = 1
    """How many ranks have this part; the optimizer of each must be given the same gradient."""

    def names(self, ids: Tensor) -> Tensor:
        """From the rank's numbers of rows to the table's; int64, any shape and device."""
        piece = torch.bucketize(ids, self.firsts.to(ids.device), right=True) - 1
        return ids + self.shifts.to(ids.device)[piece]

    def columns(self, row_shape: "tuple[int, ...] | torch.Size", run: int) -> list[int]:
        """The first column, over all vectors of a row of the table, of each run of the weights of a row of this shape.

        run: how many weights a run has, a divisor of the last size.
        """
        *vectors, width = row_shape
        count = 1
        for size in vectors:
            count *= size
        return [v * self.width + self.column + c for v in range(count) for c in range(0, width, run)]


def hold_shard(parameter: Tensor, shard: RowShard) -> None:
    """Say which part of a table a parameter holds."""
    setattr(parameter, _SHARD, shard)


def shard_of(parameter: Tensor) -> RowShard | None:
    """Which part of a table a parameter holds; None where it holds the whole."""
    return getattr(parameter, _SHARD, None)
