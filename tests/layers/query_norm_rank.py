"""One of two processes that have a QueryBatchNorm.

Reads rows, mask and coefficients of the rank from batch.pt, writes output, gradients and statistics to RANK.pt, once
for each way to share statistics: "group", "ddp", and "checkpoint" within DDP. Before, under "alone", rank 0 trains a
layer while rank 1 does not, and notes what it was told.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from peerlm.layers import QueryBatchNorm, share_statistics


class Checkpointed(nn.Module):
    def __init__(self, norm: QueryBatchNorm):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return checkpoint(self.norm, x, mask, use_reentrant=False)


def train_alone(x: Tensor, mask: Tensor) -> list[str]:
    norm = QueryBatchNorm(x.shape[1]).double()
    with warnings.catch_warnings(record=True) as told:
        norm(x, mask).sum().backward()
        norm.eval()(x, mask)
    return [str(warning.message) for warning in told]


def train_shared(how: str, x: Tensor, mask: Tensor, coefficients: Tensor) -> dict[str, Any]:
    norm = QueryBatchNorm(x.shape[1]).double()
    x = x.clone().requires_grad_()
    call: nn.Module = norm
    if how == "group":
        share_statistics(norm, dist.group.WORLD)
    else:
        call = DistributedDataParallel(Checkpointed(norm) if how == "checkpoint" else norm)
    out = call(x, mask)
    (out * coefficients * mask[:, None]).sum().backward()
    return {
        "out": out.detach(),
        "x": x.grad,
        "weight": norm.weight.grad,
        "bias": norm.bias.grad,
        "running_mean": norm.running_mean,
        "running_var": norm.running_var,
    }


def share(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    x, mask, coefficients = torch.load(folder / "batch.pt")[rank]
    results: dict[str, Any] = {"alone": train_alone(x, mask) if rank == 0 else None}
    dist.barrier()
    for how in ("group", "ddp", "checkpoint"):
        results[how] = train_shared(how, x, mask, coefficients)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()
