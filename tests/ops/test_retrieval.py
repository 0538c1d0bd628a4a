"""Product-key retrieval against exhaustive search over all N experts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peerlm.ops import api, reference
from peerlm.ops.functions import WEIGHTINGS
from peerlm.ops.pairing import PAIRINGS
from peerlm.testing import (
    all_keys,
    assert_within_budget,
    exhaustive_ids,
    exhaustive_scores,
    expert_pairs,
    weigh_floats,
)

# Values whose sums tie, or tie only once rounded, in float32 and in float64.
FEW_VALUES = st.sampled_from([-1.0, 0.0, 0.5, 1.0])
COLLIDING_VALUES = st.sampled_from(
    [
        0.0,
        -0.0,
        1.0,
        1 + 2.0**-23,
        1 - 2.0**-24,
        1e-8,
        -1e-8,
        3e8,
        -3e8,
        3e8 + 32,
        2.0**-149,
        -(2.0**-149),
        2.0**-126,
        1e30,
        2.0**53,
        1e-300,
        5e-324,
    ]
)
ANY_FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)
PAIRING = st.sampled_from(sorted(PAIRINGS))


@st.composite
def half_score_cases(draw: st.DrawFn) -> tuple[Tensor, int, str]:
    """Half scores (2, T, n) of one kind of value, k and a pairing."""
    n = draw(st.integers(1, 12))
    tokens = draw(st.integers(1, 3))
    values = draw(st.sampled_from([FEW_VALUES, COLLIDING_VALUES, ANY_FLOATS]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    entries = draw(st.lists(values, min_size=2 * tokens * n, max_size=2 * tokens * n))
    return torch.tensor(entries, dtype=dtype).view(2, tokens, n), draw(st.integers(1, n)), draw(PAIRING)


@st.composite
def integer_cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, str]:
    """Queries, sub-keys, k and a pairing; integers, so that every dtype holds the scores exactly."""
    n, heads, half = draw(st.integers(1, 12)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    key_heads = draw(st.sampled_from([1, heads]))
    tokens = draw(st.integers(1, 3))
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]))
    bound = draw(st.sampled_from([1, 3]))

    def integers(*shape: int) -> Tensor:
        size = torch.Size(shape).numel()
        entries = draw(st.lists(st.integers(-bound, bound), min_size=size, max_size=size))
        return torch.tensor(entries, dtype=dtype).view(shape)

    return integers(tokens, heads, 2 * half), integers(2, key_heads, n, half), draw(st.integers(1, n)), draw(PAIRING)


def assert_ids_are_exhaustive(scores_2Tn: Tensor, k: int, pairing: str) -> None:
    first, second = scores_2Tn.tolist()
    expected = [exhaustive_ids(a, b, k, pairing) for a, b in zip(first, second, strict=True)]
    assert reference.retrieve_ids(scores_2Tn, k, pairing).tolist() == expected


def assert_search_is_exhaustive(query_THX: Tensor, sub_keys_2HnC: Tensor, k: int, pairing: str) -> None:
    scores_THN = exhaustive_scores(query_THX.long(), sub_keys_2HnC.long(), pairing).tolist()
    expected = [
        [sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k] for scores in token] for token in scores_THN
    ]
    weights, ids = api.retrieve(query_THX, sub_keys_2HnC, k, weighting="none", pairing=pairing)
    assert ids.dtype == torch.int64
    assert ids.tolist() == expected
    assert weights.dtype == torch.promote_types(query_THX.dtype, torch.float32)
    for t, token in enumerate(expected):
        for h, best in enumerate(token):
            assert weights[t, h].tolist() == [scores_THN[t][h][i] for i in best]


@given(half_score_cases())
@settings(max_examples=60)
def test_ids_equal_exact_search(case: tuple[Tensor, int, str]) -> None:
    assert_ids_are_exhaustive(*case)


@given(integer_cases())
@settings(max_examples=60)
def test_retrieval_equals_search_over_all_keys(case: tuple[Tensor, Tensor, int, str]) -> None:
    assert_search_is_exhaustive(*case)


@pytest.mark.slow
@given(half_score_cases(), integer_cases())
@settings(max_examples=300)
def test_retrieval_equals_exhaustive_search_in_300_examples(
    scores: tuple[Tensor, int, str], search: tuple[Tensor, Tensor, int, str]
) -> None:
    assert_ids_are_exhaustive(*scores)
    assert_search_is_exhaustive(*search)


def test_all_keys_are_in_the_order_of_ids() -> None:
    sub_keys = torch.tensor([[[[1.0], [2.0]]], [[[3.0], [4.0]]]])
    assert all_keys(sub_keys).tolist() == [[[1.0, 3.0], [1.0, 4.0], [2.0, 3.0], [2.0, 4.0]]]


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_pairings_give_every_id_once_and_their_inverses_give_it_back(pairing: str) -> None:
    for n in (1, 2, 7, 40):
        i, j = torch.tensor(expert_pairs(n, pairing)).T
        assert torch.equal(PAIRINGS[pairing].ids(i, j, n), torch.arange(n * n))
        assert [part.tolist() for part in PAIRINGS[pairing].sub_keys(torch.arange(n * n), n)] == [
            i.tolist(),
            j.tolist(),
        ]


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_pairings_are_monotone(pairing: str) -> None:
    ids = {pair: expert_id for expert_id, pair in enumerate(expert_pairs(9, pairing))}
    for (i, j), expert_id in ids.items():
        assert expert_id == max(ids[a, b] for a in range(i + 1) for b in range(j + 1))


def test_inverse_of_large_ids_in_shells() -> None:
    sides = torch.tensor([2**20 - 1, 2**20, 2**23 + 1])
    for shift in (-1, 0, 1):
        ids = sides * sides + shift
        i, j = PAIRINGS["shells"].sub_keys(ids, 2**24)
        assert torch.equal(PAIRINGS["shells"].ids(i, j, 2**24), ids)
        assert torch.equal(torch.maximum(i, j), sides - int(shift < 0))


def test_ids_in_shells_do_not_depend_on_how_many_sub_keys_there_are() -> None:
    scores = torch.randn(2, 6, 9)
    more = torch.cat([scores, torch.full((2, 6, 5), -100.0)], dim=-1)
    assert torch.equal(reference.retrieve_ids(more, 9, "shells"), reference.retrieve_ids(scores, 9, "shells"))
    assert not torch.equal(reference.retrieve_ids(more, 9), reference.retrieve_ids(scores, 9))


def test_unknown_pairing() -> None:
    with pytest.raises(ValueError, match=r"pairing is 'shell'; choose one of row-major, shells"):
        api.retrieve(torch.ones(1, 1, 2), torch.ones(2, 1, 1, 1), 1, pairing="shell")


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_everything_tied_retrieves_the_lowest_ids(pairing: str) -> None:
    assert reference.retrieve_ids(torch.zeros(2, 4, 9), 9, pairing).tolist() == [list(range(9))] * 4


def test_sums_that_tie_only_by_rounding_are_told_apart() -> None:
    # In float32 all four sums round to 3e8; exactly, id 3 = 3e8 + 2e-8 is the highest.
    scores = torch.tensor([[[3e8, 3e8]], [[1e-8, 2e-8]]])
    assert reference.retrieve_ids(scores, 2).tolist() == [[1, 3]]


def test_k_equal_to_n_of_one_expert() -> None:
    weights, ids = api.retrieve(torch.ones(3, 2, 4), torch.ones(2, 1, 1, 2), 1)
    assert ids.tolist() == [[[0], [0]]] * 3
    assert weights.tolist() == [[[1.0], [1.0]]] * 3


@pytest.mark.parametrize("key_heads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_random_scores_are_those_of_the_best_experts(key_heads: int, dtype: torch.dtype) -> None:
    """Rounding may swap experts of nearly equal score, but not cost score beyond the budget."""
    tokens, heads, n, half, k = 16, 3, 32, 16, 8
    query = torch.randn(tokens, heads, 2 * half).to(dtype)
    sub_keys = torch.randn(2, key_heads, n, half).to(dtype)
    exact = exhaustive_scores(query.double(), sub_keys.double())
    plain = exhaustive_scores(query.float(), sub_keys.float()).topk(k).values
    weights, ids = api.retrieve(query, sub_keys, k, weighting="none")
    assert_within_budget(weights, plain, exact.topk(k).values)
    assert_within_budget(exact.gather(-1, ids).float(), plain, exact.topk(k).values)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weightings(weighting: str) -> None:
    query, sub_keys = torch.randn(5, 2, 6, dtype=torch.float64), torch.randn(2, 1, 4, 3, dtype=torch.float64)
    scores, ids = api.retrieve(query, sub_keys, 3, weighting="none")
    weights, same_ids = api.retrieve(query, sub_keys, 3, weighting=weighting)
    expected = [[weigh_floats(head, weighting) for head in token] for token in scores.tolist()]
    assert torch.equal(ids, same_ids)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("key_heads", [1, 2])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_gradients_of_the_weights(key_heads: int, weighting: str) -> None:
    query = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    sub_keys = torch.randn(2, key_heads, 4, 2, dtype=torch.float64, requires_grad=True)

    def weights(query: Tensor, sub_keys: Tensor) -> Tensor:
        return api.retrieve(query, sub_keys, 3, weighting=weighting)[0]

    assert torch.autograd.gradcheck(weights, (query, sub_keys))


def test_autocast_does_not_round_the_scores() -> None:
    query, sub_keys = torch.randn(64, 2, 16), torch.randn(2, 1, 32, 8)
    weights, ids = api.retrieve(query, sub_keys, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights_autocast, ids_autocast = api.retrieve(query, sub_keys, 4)
    assert weights_autocast.dtype == torch.float32
    assert torch.equal(ids, ids_autocast)
    assert torch.equal(weights, weights_autocast)


def test_no_tokens() -> None:
    weights, ids = api.retrieve(torch.empty(0, 2, 4), torch.randn(2, 1, 4, 2), 3)
    assert weights.shape == ids.shape == (0, 2, 3)


@pytest.mark.parametrize("k", [1, 2, 7, 16, 64])
def test_candidate_ranks_are_made_on_the_device(k: int) -> None:
    rank_a, rank_b = reference._candidate_ranks(k, torch.device("cpu"))
    pairs = [(a, b) for a in range(k) for b in range(k) if (a + 1) * (b + 1) <= k]
    assert list(zip(rank_a.tolist(), rank_b.tolist(), strict=True)) == pairs
    assert reference._candidate_ranks(k, torch.device("meta"))[0].shape == (len(pairs),)
