"""Batches: a permutation of any size, the same from any position, with any workers, on any ranks."""

import multiprocessing
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peerlm.data import Batch, TokenShards, TokenWindows, batches, sequential_batches, window_order
from peerlm.errors import UserError

CONTEXT = 16


@pytest.fixture(scope="module")
def windows(prepared: Path) -> TokenWindows:
    return TokenWindows(TokenShards(prepared, "train"), CONTEXT)


def take(stream: Iterator[Batch], count: int) -> torch.Tensor:
    """The next batches, one after another: (count * B, T)."""
    return torch.cat([batch["input_ids"] for batch in islice(stream, count)])


@given(st.integers(1, 3000), st.integers(0, 2**70), st.integers(0, 2**40))
def test_order_is_a_permutation(num_windows: int, seed: int, epoch: int) -> None:
    order = window_order(np.arange(num_windows), num_windows, seed, epoch)
    assert sorted(order.tolist()) == list(range(num_windows))


@pytest.mark.parametrize("num_windows", [1, 2, 3, 4, 5, 7, 16, 17, 64, 65, 4093, 4096, 4097, 65537])
def test_order_at_awkward_sizes(num_windows: int) -> None:
    order = window_order(np.arange(num_windows), num_windows, 0, 0)
    assert np.array_equal(np.sort(order), np.arange(num_windows))


@given(st.integers(1, 2**62), st.data())
def test_order_of_one_place_is_that_of_many(num_windows: int, data: st.DataObject) -> None:
    places = data.draw(st.lists(st.integers(0, num_windows - 1), min_size=1, max_size=4))
    order = window_order(np.array(places).reshape(1, -1), num_windows, 3, 4)
    assert order.shape == (1, len(places))
    assert [window_order(place, num_windows, 3, 4) for place in places] == order[0].tolist()
    assert len(set(order[0].tolist())) == len(set(places))


def test_order_is_fixed_for_good() -> None:
    """Saved positions mean the same windows in every version."""
    assert window_order(np.arange(8), 1000, 1, 2).tolist() == [418, 190, 473, 848, 60, 577, 875, 402]


def test_order_differs_by_epoch_and_seed() -> None:
    orders = {tuple(window_order(np.arange(100), 100, seed, epoch).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_order_is_uniform() -> None:
    """Every window is as likely at every place, and every pair of windows next to each other.

    Chi-square over 1,000 epochs of 7 windows: 36 degrees of freedom have their 99.99% point at 80.1, and 41
    (all ordered pairs less one) at 87.5.
    """
    size, epochs = 7, 1000
    orders = np.stack([window_order(np.arange(size), size, 0, epoch) for epoch in range(epochs)])
    counts = np.stack([np.bincount(orders[:, place], minlength=size) for place in range(size)])
    assert ((counts - epochs / size) ** 2 / (epochs / size)).sum() < 80.1
    pairs = np.bincount(orders[:, 2] * size + orders[:, 3], minlength=size**2).reshape(size, size)
    pairs = pairs[~np.eye(size, dtype=bool)]
    assert ((pairs - epochs / 42) ** 2 / (epochs / 42)).sum() < 87.5


def test_order_of_bad_arguments() -> None:
    for index in (-1, 5, np.array([0, 5])):
        with pytest.raises(IndexError, match="index must lie within 0 to 4, got"):
            window_order(index, 5, 0, 0)
    for seed, epoch in [(-1, 0), (0, -1)]:
        with pytest.raises(ValueError, match=f"must be 0 or more, got seed {seed} and epoch {epoch}"):
            window_order(0, 5, seed, epoch)


def test_windows_are_consecutive(windows: TokenWindows) -> None:
    tokens = windows.shards.tokens(0, windows.shards.num_tokens).tolist()
    assert len(windows) == len(tokens) // CONTEXT
    assert windows[0].dtype == torch.int64
    joined = torch.cat([windows[index] for index in range(len(windows))]).tolist()
    assert joined == tokens[: len(windows) * CONTEXT]
    with pytest.raises(IndexError, match=r"window .* does not lie within"):
        windows[len(windows)]
    with pytest.raises(IndexError, match="window -1 does not lie within"):
        windows[-1]


def test_windows_need_tokens(prepared: Path) -> None:
    shards = TokenShards(prepared, "heldout")
    assert len(TokenWindows(shards, shards.num_tokens)) == 1
    with pytest.raises(UserError, match=r"the heldout split of .* tokens, less than one window of .*: lower"):
        TokenWindows(shards, shards.num_tokens + 1)
    with pytest.raises(UserError, match="context is 1: it must be at least 2 tokens"):
        TokenWindows(shards, 1)


def test_an_epoch_shows_every_window_once_and_the_next_in_another_order(windows: TokenWindows) -> None:
    size = len(windows)
    stream = batches(windows, batch_size=1, seed=0)
    first, second = take(stream, size), take(stream, size)
    everything = torch.stack([windows[index] for index in range(size)])
    order = window_order(np.arange(size), size, 0, 0)
    assert torch.equal(first, everything[order])
    assert torch.equal(second, everything[window_order(np.arange(size), size, 0, 1)])
    assert not torch.equal(first, second)


@given(st.integers(0, 10**9), st.integers(1, 40), st.integers(1, 5))
def test_resume_from_any_position(windows: TokenWindows, position: int, batch_size: int, steps: int) -> None:
    """Batches are larger than the epoch too: the position alone says all."""
    whole = batches(windows, batch_size=batch_size, seed=5, position=position)
    for _ in range(steps):
        next(whole)
    resumed = batches(windows, batch_size=batch_size, seed=5, position=position + steps * batch_size)
    assert torch.equal(take(whole, 2), take(resumed, 2))


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 5))
def test_ranks_together_make_the_batch_of_one(
    windows: TokenWindows, position: int, batch_size: int, world_size: int
) -> None:
    ranks = [
        batches(windows, batch_size=batch_size, seed=1, position=position, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    single = batches(windows, batch_size=batch_size * world_size, seed=1, position=position)
    for _ in range(3):
        assert torch.equal(torch.cat([take(rank, 1) for rank in ranks]), take(single, 1))


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_workers_change_nothing(windows: TokenWindows) -> None:
    alone, helped = (
        take(batches(windows, batch_size=7, seed=2, position=11, workers=workers), 12) for workers in (0, 2)
    )
    assert torch.equal(alone, helped)


def test_workers_are_not_reached_by_signals_to_the_run(windows: TokenWindows) -> None:
    """As torchrun sends SIGTERM to a rank's whole group; a worker that died of it would end the run within a step."""
    before = multiprocessing.active_children()
    stream = batches(windows, batch_size=2, seed=0, workers=2)
    take(stream, 2)  # one of each worker, which has left the group by then
    workers = [worker.pid for worker in multiprocessing.active_children() if worker not in before]
    assert len(workers) == 2
    assert [os.getpgid(worker) for worker in workers if worker is not None] == workers
    assert os.getpgrp() not in workers


def test_global_random_state_is_left_alone(windows: TokenWindows) -> None:
    before = torch.get_rng_state()
    take(batches(windows, batch_size=2, seed=2), 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 0},
        {"seed": -1},
        {"position": -1},
        {"rank": 1},
        {"rank": -1},
        {"world_size": 0},
        {"workers": -1},
    ],
)
def test_bad_arguments(changes: dict[str, int], windows: TokenWindows) -> None:
    [(name, value)] = changes.items()
    with pytest.raises(ValueError, match=f"{name}.* got .*{name} {value}"):
        batches(windows, **{"batch_size": 1, "seed": 0, **changes})


def test_sequential_batches(windows: TokenWindows) -> None:
    size = len(windows)
    everything = torch.stack([windows[index] for index in range(size)])
    for batch_size, limit, expected in [(7, None, size), (7, 10, 10), (1, 1, 1), (size + 5, size + 9, size)]:
        read = [batch["input_ids"] for batch in sequential_batches(windows, batch_size, limit)]
        assert torch.equal(torch.cat(read), everything[:expected])
        assert [len(batch) for batch in read[:-1]] == [batch_size] * (len(read) - 1)
    for batch_size, limit in [(0, None), (1, 0)]:
        with pytest.raises(ValueError, match=f"got batch_size {batch_size}, limit {limit}"):
            sequential_batches(windows, batch_size, limit)
