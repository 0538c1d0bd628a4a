"""Shortlists of bfloat16 scores: they never leave out one of the best, and change no bit of a result."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peerlm.ops.triton import retrieval, tiles
from peerlm.ops.triton.shortlist import norms_of, relative_error
from peerlm.testing import exhaustive_search

from ..retrieval_cases import KINDS, against_bfloat16, cases
from .guards import Guarded, between_poison

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = tiles.Shortlist(tokens=16, groups=16, features=16, warps=4, stages=2, places=16, lists=2, ranking_warps=1)
"""For tests of few tokens and sub-keys, of at most 16 features."""


@contextmanager
def shortlists(tile: tiles.Shortlist | None) -> Iterator[None]:
    """With these tiles where there are sub-keys for them; None: without shortlists."""

    def chosen(tokens: int, n: int, half_dim: int, k: int) -> tiles.Shortlist | None:
        return tile if tile and n >= tile.groups >= k and k <= tile.places else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "shortlist", chosen)
        yield


def retrieve(query: Tensor, sub_keys: Tensor, k: int, pairing: str = "row-major") -> tuple[Tensor, Tensor]:
    weights, ids = retrieval.retrieve(query.to(DEVICE), sub_keys.to(DEVICE), k, "none", pairing)
    return weights.cpu(), ids.cpu()


def missed(query: Tensor, sub_keys: Tensor, k: int) -> int:
    count = retrieval.num_missed(query.to(DEVICE), sub_keys.to(DEVICE), k)
    assert count is not None
    return int(count)


def assert_the_same_bits(query: Tensor, sub_keys: Tensor, k: int, tile: tiles.Shortlist = SMALL) -> None:
    with shortlists(tile):
        weights, ids = retrieve(query, sub_keys, k)
    with shortlists(None):
        expected, expected_ids = retrieve(query, sub_keys, k)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, rtol=0, atol=0, equal_nan=True)


@given(case=cases(max_n=40, max_tokens=6, max_half=9))
@settings(max_examples=25)
def test_ids_are_those_of_exhaustive_search(case: tuple[Tensor, Tensor, int, str]) -> None:
    query, sub_keys, k, pairing = case
    with shortlists(SMALL):
        assert torch.equal(retrieve(query, sub_keys, k, pairing)[1], exhaustive_search(query, sub_keys, k, pairing)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_values_has_the_bits_of_the_exhaustive_search(kind: str) -> None:
    draw_query, query_size, draw_keys, keys_size = KINDS[kind]
    generator = torch.Generator().manual_seed(1)
    query = draw_query(generator, 5, 2, 14) * query_size
    for sets in (1, 2):
        assert_the_same_bits(query, draw_keys(generator, 2, sets, 37, 7) * keys_size, 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU adds in an order of its own")
def test_scores_have_the_same_bits_in_whatever_order_a_gpu_sums_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """As threads that hand numbers to each other do: the first half of the numbers, added to the second half."""
    from triton.runtime import interpreter

    def by_halves(self: Any, numbers: Any) -> Any:
        data = np.moveaxis(numbers.handle.data, self.axis, 0)
        while len(data) > 1 and len(data) % 2 == 0:
            data = data[: len(data) // 2] + data[len(data) // 2 :]
        total = np.sum(data, axis=0)
        return self.to_tensor(np.expand_dims(total, self.axis) if self.keep_dims else total, numbers.dtype)

    query, sub_keys = torch.randn(4, 2, 12), torch.randn(2, 1, 20, 6)
    query[..., :4] *= 1e3
    sub_keys[..., 3, :] = sub_keys[..., 7, :]

    def scores(tile: tiles.Shortlist | None) -> Tensor:
        with shortlists(tile):
            return retrieval._best_of_halves(query.to(DEVICE), sub_keys.to(DEVICE), 4)[0]

    expected = scores(None)
    assert torch.equal(scores(SMALL), expected)
    monkeypatch.setattr(interpreter.ReduceOps, "sum", by_halves)
    assert torch.equal(scores(SMALL), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("where", ["query", "sub_keys"])
def test_values_that_bfloat16_cannot_tell_apart_from_infinity_change_nothing(where: str, bad: float) -> None:
    query, sub_keys = torch.randn(3, 2, 6), torch.randn(2, 1, 20, 3)
    if where == "query":
        query[1, 1, 3] = bad
    else:
        sub_keys[0, 0, 7, 2] = bad
    assert_the_same_bits(query, sub_keys, 4)
    with shortlists(SMALL):
        assert missed(query, sub_keys, 4) >= (1 if where == "query" else 6)


def test_a_score_whose_sum_overflows_in_float32_is_not_left_out() -> None:
    query, sub_keys = torch.full((1, 1, 4), 2.0**63), torch.zeros(2, 1, 20, 2)
    sub_keys[..., 0] = -(2.0**63)
    sub_keys[..., 4, :] = torch.tensor([2.0**60, 0.0])
    sub_keys[..., 9, :] = torch.tensor([2.0**66, 2.0**61 - 2.0**66])  # infinity less infinity; best in float64
    assert exhaustive_search(query, sub_keys, 1)[0].item() == 9 * 20 + 9
    assert_the_same_bits(query, sub_keys, 1)


def test_nothing_is_read_or_written_beside_the_tensors() -> None:
    for tokens, heads, sets, n, k, half in ((3, 2, 1, 17, 3, 3), (17, 1, 1, 16, 8, 1)):
        query, sub_keys = torch.randn(tokens, heads, 2 * half).to(DEVICE), torch.randn(2, sets, n, half).to(DEVICE)
        query[0] = 0.0  # of which all scores tie: it is missed
        with shortlists(SMALL):
            expected = retrieval.retrieve(query, sub_keys, k, "none")
            with Guarded() as guarded:
                found = retrieval.retrieve(between_poison(query), between_poison(sub_keys), k, "none")
        guarded.assert_kept()
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_lists_hold_the_best_of_usual_scores_and_none_of_those_that_tie() -> None:
    generator = torch.Generator().manual_seed(2)
    query, sub_keys = torch.randn(64, 1, 32, generator=generator), torch.randn(2, 1, 256, 16, generator=generator)
    tile = tiles.shortlist(128, 256, 16, 4)
    assert tile is not None
    with shortlists(tile):
        assert missed(query, sub_keys, 4) == 0
        query[5:7] = 0.0
        assert missed(query, sub_keys, 4) == 2 * 2
    assert_the_same_bits(query, sub_keys, 4, tile)


def test_few_tokens_few_sub_keys_and_large_ones_go_without_lists() -> None:
    assert tiles.shortlist(4096, 1024, 64, 16) is not None
    assert tiles.shortlist(8, 1024, 64, 16) is None
    assert tiles.shortlist(4096, 128, 64, 16) is None
    assert tiles.shortlist(4096, 1024, 128, 32) is not None
    assert tiles.shortlist(4096, 1024, 128, 64) is None
    assert tiles.shortlist(4096, 1024, 256, 16) is None
    assert tiles.shortlist(4096, 1024, 64, 100) is None
    assert retrieval.num_missed(torch.zeros(8, 1, 4, device=DEVICE), torch.zeros(2, 1, 9, 2, device=DEVICE), 2) is None


@given(data=st.data(), n=st.integers(8, 40), groups=st.integers(4, 8), k=st.integers(1, 4))
@settings(max_examples=300)
def test_whatever_roundings_do_within_their_bound_the_best_are_listed(
    data: st.DataObject, n: int, groups: int, k: int
) -> None:
    """The rule of `list_candidates`, in numbers: sixteenths, where its arithmetic is exact."""
    exact = np.array(data.draw(st.lists(st.integers(-20, 20), min_size=n, max_size=n))) / 16
    error = data.draw(st.integers(0, 12)) / 16
    off = np.array(data.draw(st.lists(st.sampled_from([-1, -0.5, 0, 0.5, 1]), min_size=n, max_size=n)))
    best = np.lexsort((np.arange(n), -exact))[:k]
    if data.draw(st.booleans()):  # against us: the best seem worse, all others better
        off = np.where(np.isin(np.arange(n), best), -1, 1)
    approximate = exact + error * off
    of_groups = np.sort([approximate[g::groups].max() for g in range(groups)])
    reached = of_groups[-k] - data.draw(st.integers(0, 8)) / 16  # or less, where halving stops
    listed = np.flatnonzero(approximate >= reached - 2 * error)
    assert set(best) <= set(listed)
    if data.draw(st.booleans()) and error > 0 and len(listed) > k:  # and the bound is tight
        assert reached <= approximate[best].max() + 2 * error


def truncated(value: float) -> float:
    """A number cut off, not rounded, to the 24 bits of float32."""
    mantissa, exponent = np.frexp(value)
    return float(np.ldexp(np.trunc(mantissa * 2.0**24), exponent - 24))


@given(
    seed=st.integers(0, 2**32),
    half_dim=st.sampled_from([1, 2, 16, 64, 128]),
    kind=st.sampled_from(["normal", "all rounded up", "all rounded down", "one sign"]),
)
@settings(max_examples=100)
def test_scores_of_bfloat16_whose_sums_are_cut_off_are_within_the_bound(seed: int, half_dim: int, kind: str) -> None:
    """The bound of `list_candidates`, with the functions that it takes from the host."""
    generator = torch.Generator().manual_seed(seed)
    if kind.startswith("all"):  # as far from bfloat16 as can be
        away = 2.0**-8 + (2.0**-20 if kind == "all rounded up" else -(2.0**-20))
        query = key = torch.full((half_dim,), 1 + away)
    else:
        query, key = torch.randn(2, half_dim, generator=generator)
    if kind == "one sign":
        query, key = query.abs(), key.abs()
    score = 0.0
    for a, b in zip(query.bfloat16().tolist(), key.bfloat16().tolist(), strict=True):
        score = truncated(score + a * b)
    off = abs(score - (query.double() * key.double()).sum())
    (of_query, query_cut_off), (of_key, key_cut_off) = (
        norms_of(vector.expand(2, 1, 1, -1), vector.bfloat16().expand(2, 1, 1, -1))[:, 0, 0] for vector in (query, key)
    )
    by_rounding = query_cut_off * of_key + (of_query + query_cut_off) * key_cut_off
    by_sums = relative_error(half_dim) * (of_query + query_cut_off) * (of_key + key_cut_off)
    assert off <= by_rounding + by_sums
    if kind.startswith("all"):
        assert off > 0.99 * by_rounding


def test_what_bfloat16_misjudges_most_is_listed() -> None:
    query, sub_keys = against_bfloat16(5, 20)
    for k in (1, 2):
        with shortlists(SMALL):
            assert missed(query, sub_keys, k) == 0
        assert_the_same_bits(query, sub_keys, k)
    rounded = query.bfloat16()[0, 0, :16].float() @ sub_keys.bfloat16()[0, 0].float().T
    assert rounded.argmax() == 1
    assert exhaustive_search(query[:1], sub_keys, 1)[0].item() == 0
