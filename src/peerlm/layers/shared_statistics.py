"""Statistics of a batch that ranks share: under DistributedDataParallel, or where they are told to."""

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from peerlm.ranks import ddp_group, inside_backward


class SharesStatistics(nn.Module):
    """A module that takes statistics of a batch, over the ranks that train it together.

    Attributes:
        process_group: the ranks that share statistics, beside those of DistributedDataParallel; None at the start, and
            in copies.
    """

    process_group: "dist.ProcessGroup | None" = None
    _last_group: "dist.ProcessGroup | None" = None

    def _ranks(self) -> "dist.ProcessGroup | None":
        """Those to share the statistics of this pass with; None where this rank has its own."""
        if not dist.is_available() or not dist.is_initialized():
            return None
        if inside_backward():
            return self._last_group
        group = self.process_group or ddp_group()
        if group is None and dist.get_world_size() > 1 and not torch.compiler.is_compiling():
            warnings.warn(
                f"this rank's {type(self).__name__} takes statistics of its own batch alone, because it is not inside "
                "DistributedDataParallel; peerlm.layers.share_statistics(model, group) shares them",
                stacklevel=3,
            )
        if group is not None and dist.get_world_size(group) == 1:
            group = None
        if self._last_group is not group:
            self._last_group = group
        return group

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: all but process groups, which belong to this module in this process."""
        return {name: value for name, value in self.__dict__.items() if name not in ("process_group", "_last_group")}


def share_statistics(module: nn.Module, group: "dist.ProcessGroup | None") -> None:
    """Let all that takes statistics of a batch in a module take them over the ranks of a process group.

    These are every `QueryBatchNorm` and every `BalancedRouter`. Every rank of the group must then call the module in
    training whenever one does. None ends it. Under DistributedDataParallel this is not needed; under FSDP it is.
    """
    for each in module.modules():
        if isinstance(each, SharesStatistics):
            each.process_group = group
