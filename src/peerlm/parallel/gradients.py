"""Gradients of what several ranks have, whole parameters or the same rows: averaged at the end of a backward pass."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from peerlm.optim.sparse_gradients import coalesced
from peerlm.parallel.exchange import padded
from peerlm.parallel.place import Axis

_AVERAGED = "_peerlm_averaged"


class Averaged:
    """Parameters whose gradients become the mean over ranks: those of whole ones in one all-reduce for each dtype.

    Gradients of rows become the mean over the ranks that have copies of them, each row that any of these has.
    Where no rank has a gradient of a parameter, none has one afterwards; where some have, others' count as 0.
    Every rank must run its backward passes when the others do.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], ranks: Axis, rows: Sequence[nn.Parameter], copies: Axis):
        self.parameters = sorted(parameters, key=lambda each: str(each.dtype))
        self.rows = list(rows) if copies.size > 1 else []
        self.ranks, self.copies = ranks, copies
        self.sync = True
        self._queued = False
        everything = (*self.parameters, *self.rows)
        self._hooks = [each.register_post_accumulate_grad_hook(self._soon) for each in everything]

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
        self._average_rows()
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

    def _average_rows(self) -> None:
        if not self.rows:
            return
        own = torch.tensor([[_num_rows(each.grad) for each in self.rows]], device=self.rows[0].device)
        of_ranks = self.copies.gather(own).tolist()
        for parameter, counts in zip(self.rows, zip(*of_ranks, strict=True), strict=True):
            if max(counts) >= 0:
                parameter.grad = self._mean_of_rows(parameter, counts)

    def _mean_of_rows(self, parameter: nn.Parameter, counts: Sequence[int]) -> Tensor:
        """The mean over copies of a gradient that has this many rows on each, coalesced and the same on all."""
        most, gradient = max(counts), parameter.grad
        if gradient is None:
            ids, values = torch.zeros(0, dtype=torch.int64, device=parameter.device), parameter.detach()[:0]
        else:
            ids, values = _rows_of(gradient)
        everyone = [self.copies.gather(padded(each, most)) for each in (ids, values)]
        ids, values = (
            torch.cat([part[:count] for part, count in zip(each.split(most), counts, strict=True) if count > 0])
            if most
            else each
            for each in everyone
        )
        mean = torch.sparse_coo_tensor(ids[None], values / self.copies.size, parameter.shape, check_invariants=False)
        return mean.coalesce()


def _num_rows(gradient: Tensor | None) -> int:
    """Of how many rows there is a gradient; -1 where there is none."""
    return -1 if gradient is None else len(_rows_of(gradient)[0])


def _rows_of(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct numbers of rows and their gradients, of a gradient of rows."""
    if not gradient.is_sparse:
        return torch.arange(len(gradient), device=gradient.device), gradient
    gradient = coalesced(gradient)
    return gradient.indices()[0], gradient.values()


def average_gradients(
    model: nn.Module, parameters: Sequence[nn.Parameter], ranks: Axis, rows: Sequence[nn.Parameter], copies: Axis
) -> None:
    """Average from now on the gradients of parameters of a model over ranks, those of rows over copies, no others."""
    before: Averaged | None = getattr(model, _AVERAGED, None)
    if before is not None:
        before.stop()
    setattr(model, _AVERAGED, Averaged(parameters, ranks, rows, copies))


def set_requires_gradient_sync(model: nn.Module, wanted: bool) -> None:
    """Whether backward passes of a model of `parallelize` exchange the gradients of what is not a table.

    Without it they add up on each rank, until a pass with it exchanges the sums. Tables without copies need none.
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
