"""The mean loss over held-out windows, as the trainer measures it between steps."""

import math
from collections.abc import Callable, Sequence, Sized
from typing import Protocol

import torch
from torch import Tensor, nn

from peerlm.evaluate.likelihood import device_of, last_logits, token_nats
from peerlm.layers.modes import evaluating
from peerlm.ranks import Ranks


class Windows(Sized, Protocol):
    """Windows of tokens by index; item i is a LongTensor (context,)."""

    def __getitem__(self, index: int) -> Tensor: ...


def held_out_loss(
    model: nn.Module,
    windows: Windows,
    *,
    batch_size: int,
    limit: int | None = None,
    ranks: Ranks | None = None,
    watch: Callable[[Sequence[int], Tensor, Tensor], None] | None = None,
) -> float:
    """Mean next-token loss in nats over the first `limit` windows (default: all), in evaluation mode.

    Each window of `context` tokens is read on its own and its last context - 1 tokens are scored: the plain
    language modelling loss, free of balance losses. Every submodule's training mode is restored. This process reads
    all windows, unless `ranks` are given: then each rank reads its share and all return the same mean, so that every
    rank must call it. `watch` sees every pass of this process: the windows' indices, their nats (B, context - 1), and
    (B,) 1 for each that counts. Raises ValueError when there are no windows.
    """
    num_windows = windows_read(windows, limit)
    device = device_of(model)
    ranks = ranks or Ranks(rank=0, world_size=1, device=device)
    # As many forward passes on each rank, since sharded models communicate in them; surplus windows weigh 0.
    mine = range(ranks.rank, math.ceil(num_windows / ranks.world_size) * ranks.world_size, ranks.world_size)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    with evaluating(model):
        for start in range(0, len(mine), batch_size):
            indices = mine[start : start + batch_size]
            input_ids = torch.stack([windows[min(index, num_windows - 1)] for index in indices]).to(device)
            real = torch.tensor([index < num_windows for index in indices], dtype=torch.float64, device=device)
            targets = input_ids[:, 1:]
            nats = token_nats(last_logits(model, input_ids[:, :-1], targets.shape[1]), targets)
            if watch is not None:
                watch(indices, nats, real)
            sums += torch.stack([real @ nats.double().mean(1), real.sum()])
    nats_per_token, counted = ranks.total(sums).tolist()
    return nats_per_token / counted


def windows_read(windows: Windows, limit: int | None) -> int:
    """How many windows a limit leaves; raises ValueError where there is none."""
    number = len(windows) if limit is None else min(limit, len(windows))
    if number < 1:
        raise ValueError(f"{len(windows)} held-out windows with limit {limit}; at least one is needed")
    return number
