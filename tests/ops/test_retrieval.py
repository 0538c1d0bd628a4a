"""Product-key retrieval against exhaustive search over all N experts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peerlm.ops import api, reference
from peerlm.testing import (
    all_keys,
    assert_within_budget,
    exhaustive_ids,
    exhaustive_scores,
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


@st.composite
def half_score_cases(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Half scores (2, T, n) of one kind of value, and k."""
    n = draw(st.integers(1, 12))
    tokens = draw(st.integers(1, 3))
    values = draw(st.sampled_from([FEW_VALUES, COLLIDING_VALUES, ANY_FLOATS]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    entries = draw(st.lists(values, min_size=2 * tokens * n, max_size=2 * tokens * n))
    return torch.tensor(entries, dtype=dtype).view(2, tokens, n), draw(st.integers(1, n))


@st.composite
def integer_cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Queries, sub-keys and k; integers, so that every dtype holds the scores exactly."""
    n, heads, half = draw(st.integers(1, 12)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    key_heads = draw(st.sampled_from([1, heads]))
    tokens = draw(st.integers(1, 3))
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]))
    bound = draw(st.sampled_from([1, 3]))

    def integers(*shape: int) -> Tensor:
        size = torch.Size(shape).numel()
        entries = draw(st.lists(st.integers(-bound, bound), min_size=size, max_size=size))
        return torch.tensor(entries, dtype=dtype).view(shape)

    return integers(tokens, heads, 2 * half), integers(2, key_heads, n, half), draw(st.integers(1, n))


def assert_ids_are_exhaustive(scores_2Tn: Tensor, k: int) -> None:
    first, second = scores_2Tn.tolist()
    expected = [exhaustive_ids(a, b, k) for a, b in zip(first, second, strict=True)]
    assert reference.retrieve_ids(scores_2Tn, k).tolist() == expected


def assert_search_is_exhaustive(query_THX: Tensor, sub_keys_2HnC: Tensor, k: int) -> None:
    scores_THN = exhaustive_scores(query_THX.long(), sub_keys_2HnC.long()).tolist()
    expected = [
        [sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k] for scores in token] for token in scores_THN
    ]
    weights, ids = api.retrieve(query_THX, sub_keys_2HnC, k, weighting="none")
    assert ids.dtype == torch.int64
    assert ids.tolist() == expected
    assert weights.dtype == torch.promote_types(query_THX.dtype, torch.float32)
    for t, token in enumerate(expected):
        for h, best in enumerate(token):
            assert weights[t, h].tolist() == [scores_THN[t][h][i] for i in best]


@given(half_score_cases())
@settings(max_examples=60)
def test_ids_equal_exact_search(case: tuple[Tensor, int]) -> None:
    assert_ids_are_exhaustive(*case)


@given(integer_cases())
@settings(max_examples=60)
def test_retrieval_equals_search_over_all_keys(case: tuple[Tensor, Tensor, int]) -> None:
    assert_search_is_exhaustive(*case)


@pytest.mark.slow
@given(half_score_cases(), integer_cases())
@settings(max_examples=1000)
def test_retrieval_equals_exhaustive_search_in_1000_examples(
    scores: tuple[Tensor, int], search: tuple[Tensor, Tensor, int]
) -> None:
    assert_ids_are_exhaustive(*scores)
    assert_search_is_exhaustive(*search)


def test_all_keys_are_in_the_order_of_ids() -> None:
    sub_keys = torch.tensor([[[[1.0], [2.0]]], [[[3.0], [4.0]]]])
    assert all_keys(sub_keys).tolist() == [[[1.0, 3.0], [1.0, 4.0], [2.0, 3.0], [2.0, 4.0]]]


def test_everything_tied_retrieves_the_lowest_ids() -> None:
    assert reference.retrieve_ids(torch.zeros(2, 4, 9), 9).tolist() == [list(range(9))] * 4


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


@pytest.mark.parametrize("weighting", reference.WEIGHTINGS)
def test_weightings(weighting: str) -> None:
    query, sub_keys = torch.randn(5, 2, 6, dtype=torch.float64), torch.randn(2, 1, 4, 3, dtype=torch.float64)
    scores, ids = api.retrieve(query, sub_keys, 3, weighting="none")
    weights, same_ids = api.retrieve(query, sub_keys, 3, weighting=weighting)
    expected = [[weigh_floats(head, weighting) for head in token] for token in scores.tolist()]
    assert torch.equal(ids, same_ids)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("key_heads", [1, 2])
@pytest.mark.parametrize("weighting", reference.WEIGHTINGS)
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
