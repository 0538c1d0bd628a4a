"""This process among those that train together: under torchrun, or within DistributedDataParallel."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from peerlm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Who we are, where we compute, and the few things that processes tell each other."""

    rank: int
    """Number of this process, 0 to world_size - 1; 0 writes the run's files."""
    world_size: int
    """Processes that train together."""
    device: torch.device
    """Where this one computes."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def mean(self, value: torch.Tensor) -> float:
        """Mean of a scalar over the processes; each must call it."""
        total = value.detach().double().clone()
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.item() / self.world_size

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over the processes, in place; each must call it."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def of_main(self, value: float) -> float:
        """The value that process 0 gives; each must call it."""
        if self.world_size == 1:
            return value
        given = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.broadcast(given, src=0)
        return given.item()

    def any(self, flag: bool) -> bool:
        """Whether any process gives True; each must call it."""
        if self.world_size == 1:
            return flag
        raised = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return bool(raised.item())

    def wait(self) -> None:
        """Until every process is here."""
        if self.world_size > 1:
            dist.barrier()


def ddp_group() -> "dist.ProcessGroup | None":
    """The ranks of the DistributedDataParallel whose forward pass is under way; None outside of one."""
    active = DistributedDataParallel._get_active_ddp_module()
    return None if active is None else active.process_group


def inside_backward() -> bool:
    """Whether autograd is at work: gradient checkpointing then repeats a forward pass, outside of `ddp_group`.

    torch.compile, which cannot ask, traces forward passes alone.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@contextmanager
def join_ranks(device: str) -> Iterator[Ranks]:
    """Join the processes that torchrun started (gloo on CPU, NCCL on CUDA) and leave them at the end.

    device: "auto" (CUDA where there is one), "cpu" or "cuda"; UserError for "cuda" on a machine without.
    """
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise UserError("device = 'cuda': PyTorch finds no CUDA device on this machine; set device to 'cpu' or 'auto'")
    local = torch.device("cpu")
    if cuda and device != "cpu":
        local = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(local)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Ranks(rank=0, world_size=1, device=local)
        return
    dist.init_process_group("nccl" if local.type == "cuda" else "gloo")
    try:
        yield Ranks(rank=dist.get_rank(), world_size=dist.get_world_size(), device=local)
    finally:
        dist.destroy_process_group()
