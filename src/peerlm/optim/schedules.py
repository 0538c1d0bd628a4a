"""Learning-rate schedules: the share of the peak that is due when some share of the budget is spent.

Pure functions of progress: they hold no state to save and know nothing of steps, so that any budget works.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peerlm.optim.muon import GROUP


def learning_rate(schedule: str, progress: float, *, peak: float, warmup: float, decay: float, final: float) -> float:
    """The learning rate that is due at a share `progress` of the budget.

    Args:
        schedule: "cosine" or "wsd" (warmup-stable-decay), by the functions of these names below.
        progress: share of the budget, 0 to 1.
        peak: highest learning rate.
        warmup, decay: shares of the budget; "cosine" does not use `decay`.
        final: share of the peak that is left at the end.

    Raises:
        ValueError: there is no such schedule.
    """
    if schedule == "cosine":
        return peak * cosine(progress, warmup=warmup, final=final)
    if schedule == "wsd":
        return peak * wsd(progress, warmup=warmup, decay=decay, final=final)
    raise ValueError(f'there is no schedule {schedule!r}: choose "cosine" or "wsd"')


def cosine(progress: float, *, warmup: float, final: float) -> float:
    """Share of the peak learning rate: linear warmup, then half a cosine down to `final`.

    progress, warmup: shares of the budget, 0 to 1. final: share of the peak that is left at the end.
    """
    if progress < warmup:
        return progress / warmup
    past = (progress - warmup) / (1 - warmup) if warmup < 1 else 1.0
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(past, 1.0)))


def wsd(progress: float, *, warmup: float, decay: float, final: float) -> float:
    """Share of the peak learning rate: linear warmup, stable peak, linear decay to `final`.

    progress, warmup, decay: shares of the budget, 0 to 1, warmup + decay <= 1. With decay 0 the peak holds
    to the end.
    """
    if progress < warmup:
        return progress / warmup
    if progress <= 1 - decay or decay == 0:
        return 1.0
    left = max(0.0, (1 - progress) / decay)
    return final + (1 - final) * left


def decaying_multiplier(progress: float, *, start: float) -> float:
    """A learning-rate multiplier that goes linearly from `start` to 1 over the run."""
    return start + (1.0 - start) * min(progress, 1.0)


def set_learning_rates(
    groups: Sequence[dict[str, Any]],
    learning_rate: float,
    *,
    progress: float,
    table_lr_decay: bool = False,
    table_warmup: float = 0.0,
) -> None:
    """Set "lr" in each group of `parameter_groups`: the scheduled learning rate times its multiplier.

    With table_lr_decay, the multiplier of "table" goes linearly to 1 over the run. It is then reduced while progress is
    below table_warmup, a share of the budget: linearly from 0. A learning rate that is a tensor stays one, and gets the
    value.
    """
    for group in groups:
        multiplier = group["lr_multiplier"]
        if group["name"] == "table":
            if table_lr_decay:
                multiplier = decaying_multiplier(progress, start=multiplier)
            if progress < table_warmup:
                multiplier *= progress / table_warmup
        if isinstance(group.get("lr"), Tensor):
            group["lr"].fill_(learning_rate * multiplier)
        else:
            group["lr"] = learning_rate * multiplier


def keep_learning_rates_on(device: torch.device, optimizer: torch.optim.Optimizer) -> None:
    """Let torch's AdamW read learning rates from a device, as a captured step must.

    Those of tables and of Muon's matrices stay numbers. On the device they are float32, in which torch's fused kernels
    read them, so that eager and captured steps have the same bits.
    """
    for group in optimizer.param_groups:
        if group.get("rows") or group.get("name") == GROUP:
            continue
        group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float32, device=device)
        if "capturable" in group:
            group["capturable"] = True
