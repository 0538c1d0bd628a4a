"""Gradients of parameters that every rank has whole: averaged over ranks at the end of a backward pass."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from peerlm.parallel.place import Axis

_AVERAGED = "_peerlm_averaged"


class Averaged:
    """Parameters whose gradients become the mean over ranks, in one all-reduce for each dtype.

    Where no rank has a gradient of a parameter, none has one afterwards; where some have, others' count as 0.
    Every rank must run its backward passes when the others do.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], ranks: Axis):
        self.parameters = sorted(parameters, key=lambda each: str(each.dtype))
        self.ranks = ranks
        self.sync = True
        self._queued = False
        self._hooks = [each.register_post_accumulate_grad_hook(self._soon) for each in self.parameters]

    def stop(self) -> None:
        """Leave gradients as they are from now on."""
        for hook in self._hooks:
            hook.remove()

    def _soon(self, parameter: Tensor) -> None:
        if self.sync and not self._queued:
            self._queued = True
            Variable._execution_engine.queue_callback(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        self._queued = False
        for _, run in groupby(self.parameters, key=lambda each: each.dtype):
            alike = list(run)
            there = torch.tensor([float(each.grad is not None) for each in alike]).to(alike[0])
            parts = [torch.zeros_like(each) if each.grad is None else each.grad for each in alike]
            flat = torch.cat([there, *(part.flatten() for part in parts)])
            dist.all_reduce(flat, group=self.ranks.group)
            self.ranks.traffic.received += 2 * (self.ranks.size - 1) * flat.nbytes // self.ranks.size
            missing = any(each.grad is None for each in alike)
            # The device is waited for only where this rank cannot know.
            found = flat[: len(alike)].tolist() if missing else [1.0] * len(alike)
            means = (flat[len(alike) :] / self.ranks.size).split([part.numel() for part in parts])
            for each, somewhere, mean in zip(alike, found, means, strict=True):
                each.grad = mean.view_as(each).clone() if somewhere else None


def average_gradients(model: nn.Module, parameters: Sequence[nn.Parameter], ranks: Axis) -> None:
    """Average the gradients of these parameters of a model, and of no others, over ranks from now on."""
    before: Averaged | None = getattr(model, _AVERAGED, None)
    if before is not None:
        before.stop()
    setattr(model, _AVERAGED, Averaged(parameters, ranks))


def set_requires_gradient_sync(model: nn.Module, wanted: bool) -> None:
    """Whether backward passes of a model of `parallelize` exchange the gradients of what is not a table.

    Without it they add up on each rank, until a pass with it exchanges the sums. Tables need none.
    """
    averaged: Averaged | None = getattr(model, _AVERAGED, None)
    if averaged is not None:
        averaged.sync = wanted
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)


@contextmanager
def unsynchronised(model: nn.Module) -> Iterator[None]:
    """Within this context backward passes exchange no gradients, which a later one does; for any model."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
        return
    set_requires_gradient_sync(model, False)
    try:
        yield
    finally:
        set_requires_gradient_sync(model, True)
