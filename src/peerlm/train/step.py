"""Gradients of one optimizer step, summed over micro-batches."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from peerlm.optim.sparse_gradients import shorten
from peerlm.parallel import unsynchronised


def autocast(precision: str, device_type: str) -> AbstractContextManager[None]:
    """The context of forward passes, by a recipe's precision."""
    if precision == "bf16":
        return torch.autocast(device_type, dtype=torch.bfloat16)
    return nullcontext()


def accumulate_gradients(
    model: nn.Module,
    input_ids_BT: Tensor,
    *,
    micro_batch_size: int,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Tensor:
    """Replace the gradients of `model` by those of its mean loss over a batch; returns that loss, detached.

    Each micro-batch weighs as many windows as it holds, so that where a loss is a mean over windows, their
    number does not change it. input_ids_BT: (B, T) int64. Ranks exchange gradients once, under DistributedDataParallel
    or `peerlm.parallel`.
    """
    model.zero_grad(set_to_none=True)
    loss = torch.zeros((), device=input_ids_BT.device)
    micro_batches = input_ids_BT.split(micro_batch_size)
    for index, micro_BT in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        with nullcontext() if last else unsynchronised(model):
            with autocast():
                share = model(input_ids=micro_BT, labels=micro_BT, use_cache=False).loss * (
                    len(micro_BT) / len(input_ids_BT)
                )
            share.backward()
        for parameter in model.parameters():
            shorten(parameter)
        loss += share.detach()
    return loss
