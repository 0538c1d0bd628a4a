"""Tokens to batches: the order is a pure function of (seed, position), so position is all there is to save.

Shapes: B windows per batch, T tokens per window (`context`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import count
from typing import TypedDict, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from peerlm.data.shards import TokenShards
from peerlm.errors import UserError

_ROUNDS = 8


class Batch(TypedDict):
    """What the model's forward takes."""

    input_ids: Tensor
    """(B, T) int64 token ids."""


class TokenWindows(Dataset[Tensor]):
    """A split cut into consecutive windows of `context` tokens, of which item i begins at token i * context.

    Windows run across document ends, which their marks show; the remainder after the last whole window is left out.
    Where documents have a beginning of their own (`shards.window_start`), each window begins with that, and item i has
    the tokens from i * (context - its length) on. Items are (T,) int64.

    Raises:
        UserError: `context` below 2 (nothing to predict), or a split shorter than one window.
    """

    def __init__(self, shards: TokenShards, context: int) -> None:
        if context < 2:
            raise UserError(f"context is {context}: it must be at least 2 tokens, one to read and one to predict")
        self.start = torch.tensor(shards.window_start, dtype=torch.int64)
        if len(self.start) >= context:
            raise UserError(f"context is {context}, but {len(self.start)} tokens begin each window: raise the context")
        if shards.num_tokens < context:
            raise UserError(
                f"the {shards.split} split of {shards.folder} has {shards.num_tokens} tokens, less than one "
                f"window of {context}: lower the context, or prepare more text"
            )
        self.shards = shards
        self.context = context

    def __len__(self) -> int:
        return (self.shards.num_tokens - len(self.start)) // (self.context - len(self.start))

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} does not lie within 0 to {len(self) - 1}")
        start = index * (self.context - len(self.start))
        window = torch.from_numpy(self.shards.tokens(start, start + self.context).astype(np.int64))
        if torch.equal(window[: len(self.start)], self.start):
            return window
        return torch.cat([self.start, window[: self.context - len(self.start)]])


@overload
def window_order(index: int, num_windows: int, seed: int, epoch: int) -> int: ...
@overload
def window_order(index: npt.NDArray[np.int64], num_windows: int, seed: int, epoch: int) -> npt.NDArray[np.int64]: ...
def window_order(
    index: int | npt.NDArray[np.int64], num_windows: int, seed: int, epoch: int
) -> int | npt.NDArray[np.int64]:
    """The window that comes at place `index` of an epoch: a keyed pseudo-random permutation.

    A balanced Feistel network permutes the least range of 4^b values that holds num_windows; a value that
    lands outside num_windows is sent through again until it lands inside (cycle walking: Black and Rogaway,
    "Ciphers with arbitrary finite domains", 2002), four times at most on average. Memory does not depend on
    num_windows.

    Args:
        index: place or places within the epoch, an int or an int64 array of any shape, 0 <= index <
            num_windows.
        num_windows: size of the permutation, at least 1.
        seed: key, >= 0.
        epoch: second key, >= 0; each epoch has an order of its own.

    Returns:
        Window numbers in the form of `index`.

    Raises:
        ValueError: a negative seed or epoch.
        IndexError: an index out of range.
    """
    places = np.asarray(index, np.int64)
    if np.any(places < 0) or np.any(places >= num_windows):
        raise IndexError(f"index must lie within 0 to {num_windows - 1}, got {places.min()} to {places.max()}")
    half_bits = max(1, ((num_windows - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    values = places.astype(np.uint64).reshape(-1)
    outside = np.arange(len(values))
    while len(outside):
        values[outside] = _feistel(values[outside], half_bits, keys)
        outside = outside[values[outside] >= num_windows]
    order = values.astype(np.int64).reshape(places.shape)
    return int(order) if isinstance(index, int) else order


@lru_cache(maxsize=16)
def _round_keys(seed: int, epoch: int) -> tuple[np.uint64, ...]:
    if seed < 0 or epoch < 0:
        raise ValueError(f"seed and epoch must be 0 or more, got seed {seed} and epoch {epoch}")
    return tuple(np.random.SeedSequence((seed, epoch)).generate_state(_ROUNDS, np.uint64))


def _feistel(values: npt.NDArray[np.uint64], half_bits: int, keys: Sequence[np.uint64]) -> npt.NDArray[np.uint64]:
    """A bijection of 0 .. 4^half_bits - 1 whose rounds use splitmix64's finaliser (Steele et al., 2014)."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        mixed = right ^ key
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
        left, right = right, left ^ (mixed & mask)
    return (left << shift) | right


def batches(
    windows: TokenWindows,
    *,
    batch_size: int,
    seed: int,
    position: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """Shuffled training batches without end, epoch after epoch, from any position on.

    Sample g of a run is window `window_order(g % len(windows), ..., epoch=g // len(windows))`. A step
    consumes batch_size * world_size consecutive samples; rank r takes the r-th batch_size of them. So the batches of
    all ranks, one after another, are the batch of a single rank. An epoch may end inside a batch.

    Args:
        windows: the data.
        batch_size: B, windows per batch on this rank.
        seed: key of the order, >= 0.
        position: samples consumed so far by all ranks; after each batch it has grown by batch_size *
            world_size.
        rank, world_size: this process among those that train together.
        workers: processes that read ahead; 0 reads in this one. The batches do not depend on it.

    Yields:
        `{"input_ids": (B, T) int64}`.

    Raises:
        ValueError: a batch size or world size below 1, a rank outside the world, a negative seed, position or
            workers.
    """
    if batch_size < 1 or world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"batch_size and world_size must be 1 or more and rank below world_size, "
            f"got batch_size {batch_size}, world_size {world_size}, rank {rank}"
        )
    if seed < 0 or position < 0 or workers < 0:
        raise ValueError(
            f"seed, position and workers must be 0 or more, got seed {seed}, position {position}, workers {workers}"
        )
    sampler = _BatchSampler(len(windows), batch_size, seed, position + rank * batch_size, batch_size * world_size)
    # A generator of its own: DataLoader would otherwise draw from the global one, and a resumed run would
    # draw twice.
    loader = DataLoader(
        windows,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_collate,
        generator=torch.Generator(),
        worker_init_fn=_leave_group,
    )
    return iter(loader)


def _leave_group(worker: int) -> None:
    """A reading process gets no signal that is sent to all of a run, which then ends it in its own time.

    torchrun sends SIGTERM to a rank's group, and a terminal Ctrl-C; a reader that dies of it ends the run in the middle
    of a step. One whose run is gone notices that by itself.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


class _BatchSampler:
    """Lists of `batch_size` window numbers without end, each beginning `stride` samples after the last."""

    def __init__(self, num_windows: int, batch_size: int, seed: int, start: int, stride: int) -> None:
        self.num_windows, self.batch_size, self.seed = num_windows, batch_size, seed
        self.start, self.stride = start, stride

    def __iter__(self) -> Iterator[list[int]]:
        for start in count(self.start, self.stride):
            yield self._windows(start, start + self.batch_size)

    def _windows(self, start: int, stop: int) -> list[int]:
        chosen: list[int] = []
        while start < stop:
            epoch, first = divmod(start, self.num_windows)
            last = min(first + stop - start, self.num_windows)
            chosen += window_order(np.arange(first, last), self.num_windows, self.seed, epoch).tolist()
            start += last - first
        return chosen


def sequential_batches(windows: TokenWindows, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
    """Each window once, in order, for evaluation; the last batch may be shorter.

    Args:
        windows: the data.
        batch_size: B, at least 1.
        limit: stop after this many windows; None takes them all.

    Raises:
        ValueError: a batch size or limit below 1.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"batch_size and limit must be 1 or more, got batch_size {batch_size}, limit {limit}")
    return _sequential(windows, batch_size, len(windows) if limit is None else min(limit, len(windows)))


def _sequential(windows: TokenWindows, batch_size: int, stop: int) -> Iterator[Batch]:
    for start in range(0, stop, batch_size):
        yield _collate([windows[index] for index in range(start, min(start + batch_size, stop))])


def _collate(windows_T: Sequence[Tensor]) -> Batch:
    return {"input_ids": torch.stack(list(windows_T))}
