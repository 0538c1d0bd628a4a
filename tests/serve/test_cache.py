"""What rows of a cache hold stays theirs, whatever joins and leaves beside them."""

import random

import pytest
import torch
from torch import Tensor

from peerlm.serve.additions import Choice
from peerlm.serve.cache import SlotCache, cache_of
from peerlm.serve.prefixes import Prefixes

PLAIN = Choice()


def written(number: int, length: int) -> Tensor:
    """Keys of a sequence (1, 2, length, 3), which are like no other's."""
    return (1000 * number + torch.arange(length)).float()[None, None, :, None].expand(1, 2, length, 3)


def step(cache: SlotCache, numbers: list[int]) -> None:
    """A pass that writes one token of each row."""
    cache.prepare()
    cache.part = slice(0, len(numbers))
    new = torch.cat([written(number, cache.lengths[row] + 1)[:, :, -1:] for row, number in enumerate(numbers)])
    columns = cache.layers[0].one_more_column()
    keys, values = cache.layers[0].update(new, -new)
    assert all(torch.equal(a, b) for a, b in zip(columns, (keys, values), strict=True))
    mask = cache.mask(torch.device("cpu")).bool()
    assert keys.isfinite().all()
    assert values.isfinite().all()
    assert keys.shape[2] == mask.shape[1] == max(cache.lengths) + 1
    for row, number in enumerate(numbers):
        expected = written(number, cache.lengths[row] + 1)[0]
        assert torch.equal(keys[row][:, mask[row]], expected)
        assert torch.equal(values[row][:, mask[row]], -expected)
    cache.advance()


@pytest.mark.parametrize("seed", range(4))
def test_rows_keep_what_they_hold_when_others_join_and_leave(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peerlm.serve.cache.FIRST_COLUMNS", 6)
    monkeypatch.setattr("peerlm.serve.cache.MIN_SPARE", 3)
    choice, cache, numbers = random.Random(seed), SlotCache(5, 20), []
    for number in range(1, 60):
        if len(numbers) < 5 and (not numbers or choice.random() < 0.5):
            length = choice.randrange(1, 20)
            keys = torch.cat([torch.full((1, 2, 4, 3), torch.nan), written(number, length)], dim=2)
            cache.join(cache_of([(keys, -keys)]), 0, length)
            numbers.append(number)
        for row in reversed(range(len(numbers))):
            if cache.lengths[row] >= 20 or choice.random() < 0.2:
                last = numbers.pop()
                spoiled = choice.random() < 0.3
                if spoiled:
                    cache.layers[0].keys[row] = torch.nan
                if row < len(numbers):
                    numbers[row] = last
                cache.leave(row, clean=spoiled)
        if numbers:
            step(cache, numbers)
    assert cache.layers[0].keys.shape[2] <= cache.most_columns == 23


def test_what_a_spoiled_row_held_does_not_reach_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = SlotCache(2, 20)
    for number in (1, 2):
        cache.join(cache_of([(written(number, 8), -written(number, 8))]), 0, 8)
    cache.layers[0].keys[1] = torch.nan
    cache.leave(1, clean=True)
    cache.join(cache_of([(written(3, 2), -written(3, 2))]), 0, 2)
    step(cache, [1, 3])


def test_kept_prefixes_stay_within_their_limit_and_the_least_used_goes_first() -> None:
    prefixes = Prefixes(60 * 24, 24)
    made = {number: [number] * 24 for number in (1, 2, 3)}

    def keep(number: int) -> None:
        prefixes.keep(PLAIN, made[number], cache_of([(written(number, 24)[:, :1, :, :], written(number, 24)[:, :1])]))

    keep(1)
    keep(2)
    assert prefixes.find(PLAIN, [1] * 20)[0] == 19
    keep(3)
    assert [prefixes.find(PLAIN, [number] * 30)[0] for number in (1, 2, 3)] == [24, 0, 24]
    assert not prefixes.wants(PLAIN, [1] * 61)
    assert not prefixes.wants(PLAIN, [3] * 20)
    assert prefixes.wants(PLAIN, [3] * 25)


def test_a_kept_prefix_is_not_changed_by_those_who_continue_it() -> None:
    prefixes = Prefixes(10_000, 24)
    prefixes.keep(PLAIN, [5] * 20, cache_of([(written(5, 20), -written(5, 20))]))
    for _ in range(2):
        count, cache = prefixes.find(PLAIN, [*[5] * 17, 6, 7])
        assert count == 17
        assert cache is not None
        keys, _ = cache.layers[0].update(written(9, 1), written(9, 1))
        assert torch.equal(keys[:, :, :17], written(5, 17))
