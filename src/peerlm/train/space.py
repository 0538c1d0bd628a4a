"""Whether the disk has room for what a run will save, known before its first step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from peerlm.errors import UserError
from peerlm.files import free_bytes
from peerlm.ops.row_keeping import keeper_of, rows_of_table
from peerlm.ops.row_shards import shard_of
from peerlm.ops.row_updates import scales_of
from peerlm.optim import RowAdamW
from peerlm.optim.muon import GROUP
from peerlm.optim.table_state import new_state


def checkpoint_bytes(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """About what the parameters of AdamW, dense or by rows, take on disk, and a checkpoint of them with its state.

    Of tables that are cut over ranks, what all ranks have is counted, as if all had as much as this one.
    """
    weights, moments = 0, 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if keeper_of(parameter) is None:  # of rows in files a checkpoint names a state
                shard = shard_of(parameter)
                parts = 1 if shard is None or shard.group is None else dist.get_world_size(shard.group)
                scales = scales_of(parameter)
                weights += parts * (parameter.nbytes + (0 if scales is None else scales.nbytes))
                moments += parts * _moments_bytes(optimizer, group, parameter)
    return weights, weights + moments


def _moments_bytes(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor) -> int:
    by_rows = isinstance(optimizer, RowAdamW)
    if by_rows and group["rows"]:
        state = new_state(torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"), group)
        return sum(value.nbytes for value in state.values() if isinstance(value, Tensor))
    one = by_rows and (group["betas"][0] == 0 or group.get("name") == GROUP)
    return (2 - one) * parameter.nbytes


def check_space(
    folder: Path, optimizer: torch.optim.Optimizer, *, checkpoints: int, warn: Callable[[str], object]
) -> None:
    """Compare free space with what is saved: some checkpoints at a time, and the model at the end.

    Args:
        folder: where; it need not exist yet.
        optimizer: over all that is trained.
        checkpoints: most of them on the disk at once, less those that are there.
        warn: called with a sentence where the space does not suffice for all.

    Raises:
        UserError: the space does not suffice for one checkpoint, or that of rows in files not for their moments.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if (keeper := keeper_of(parameter)) is not None:
                here = _moments_bytes(optimizer, group, parameter)
                keeper.require(here * rows_of_table(parameter) // max(1, len(parameter)))
    free = free_bytes(folder)
    weights, checkpoint = checkpoint_bytes(optimizer)
    needed = checkpoints * checkpoint + weights
    if free < checkpoint:
        raise UserError(
            f"the disk of {folder} has {_size(free)} free, and one checkpoint takes about {_size(checkpoint)}: free "
            "some space, or choose a folder on another disk"
        )
    if free < needed:
        warn(
            f"warning: the disk of {folder} has {_size(free)} free, and {checkpoints} checkpoints with the model take "
            f"about {_size(needed)}: free some space before they are saved"
        )


def _size(number: float) -> str:
    """Bytes in words."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:,.3g} GiB" if number < 1000 else f"{number:,.0f} GiB"
