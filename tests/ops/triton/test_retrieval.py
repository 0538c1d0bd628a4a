"""Retrieval by Triton's kernels against exhaustive search over all N experts in float64."""

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from peerlm.ops import api
from peerlm.ops.functions import WEIGHTINGS
from peerlm.ops.pairing import PAIRINGS
from peerlm.ops.triton import retrieval
from peerlm.ops.triton.limits import MOST_SUB_KEYS
from peerlm.testing import assert_within_budget, exhaustive_scores, exhaustive_search

from ..retrieval_cases import KINDS, cases, what_does_not_fit
from .guards import Guarded, between_poison

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def retrieve(
    query: Tensor, sub_keys: Tensor, k: int, weighting: str = "none", pairing: str = "row-major"
) -> tuple[Tensor, Tensor]:
    found = api.retrieve(
        query.to(DEVICE), sub_keys.to(DEVICE), k, weighting=weighting, pairing=pairing, backend="triton"
    )
    return found[0].cpu(), found[1].cpu()


def assert_exhaustive(query: Tensor, sub_keys: Tensor, k: int, pairing: str) -> None:
    weights, ids = retrieve(query, sub_keys, k, pairing=pairing)
    expected_ids, scores = exhaustive_search(query, sub_keys, k, pairing)
    assert torch.equal(ids, expected_ids)
    # Sums in float64, rounded once: another order of them may tip that rounding to the next float32
    single = torch.finfo(torch.float32)
    torch.testing.assert_close(weights, scores.float(), rtol=single.eps, atol=single.smallest_normal * single.eps)


@given(case=cases(max_n=20, max_tokens=7, max_half=9))
@settings(max_examples=30)
def test_ids_are_those_of_exhaustive_search(case: tuple[Tensor, Tensor, int, str]) -> None:
    assert_exhaustive(*case)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_values(kind: str) -> None:
    draw_query, query_size, draw_keys, keys_size = KINDS[kind]
    generator = torch.Generator().manual_seed(1)
    for n, k, half, pairing in ((40, 3, 7, "row-major"), (9, 9, 5, "shells")):
        query = draw_query(generator, 5, 2, 2 * half) * query_size
        assert_exhaustive(query, draw_keys(generator, 2, 1, n, half) * keys_size, k, pairing)


@pytest.mark.parametrize(
    ("tokens", "heads", "sets", "n", "k", "half"),
    [(1, 1, 1, 1, 1, 1), (1, 3, 3, 2, 2, 1), (17, 1, 1, 16, 1, 3), (2, 3, 3, 300, 5, 4), (1, 1, 1, 70, 64, 3)],
)
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_sizes_at_the_edges_of_tiles(
    tokens: int, heads: int, sets: int, n: int, k: int, half: int, pairing: str
) -> None:
    assert_exhaustive(torch.randn(tokens, heads, 2 * half), torch.randn(2, sets, n, half), k, pairing)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_everything_tied_retrieves_the_lowest_ids(pairing: str) -> None:
    _, ids = retrieve(torch.ones(3, 2, 6), torch.ones(2, 1, 9, 3), 5, pairing=pairing)
    assert ids.tolist() == [[list(range(5))] * 2] * 3


def test_sums_that_tie_only_by_rounding_are_told_apart() -> None:
    # In float64 both sums round to 3e20; exactly, id 1 = 3e20 + 2e-8 is the higher one.
    query, sub_keys = torch.ones(1, 1, 2), torch.tensor([[[[3e20], [3e20]]], [[[1e-8], [2e-8]]]])
    assert retrieve(query, sub_keys, 2)[1].tolist() == [[[1, 3]]]


def test_scores_below_all_of_zero_and_negative_zero_are_in_order() -> None:
    query = torch.tensor([[[1.0, 1.0]]])
    first, second = [0.0, -0.0, -1.0, -2.0], [-0.0, 0.0, -5.0, -0.5]
    sub_keys = torch.tensor([first, second]).view(2, 1, 4, 1)
    weights, ids = retrieve(query, sub_keys, 4)
    assert ids.tolist() == [[[0, 1, 4, 5]]]
    assert weights.tolist() == [[[0.0] * 4]]


@pytest.mark.parametrize("key_heads", [1, 3])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_are_within_the_error_budget(weighting: str, key_heads: int) -> None:
    for n, k, half in ((37, 7, 9), (5, 1, 40)):
        query, sub_keys = torch.randn(11, 3, 2 * half), torch.randn(2, key_heads, n, half) * half**-0.5
        weights, ids = retrieve(query, sub_keys, k, weighting)
        wide = query.double(), sub_keys.double()
        exact, exact_ids = api.retrieve(*wide, k, weighting=weighting, backend="reference")
        assert torch.equal(ids, exact_ids)
        assert_within_budget(weights, WEIGHTINGS[weighting](exhaustive_scores(query, sub_keys).gather(-1, ids)), exact)


@pytest.mark.parametrize("size", [1e-3, 30.0, 1e3])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_of_scores_of_any_size(weighting: str, size: float) -> None:
    query, sub_keys = size * torch.randn(9, 2, 8), torch.randn(2, 1, 12, 4)
    weights, _ = retrieve(query, sub_keys, 12, weighting)
    exact, _ = api.retrieve(query.double(), sub_keys.double(), 12, weighting=weighting, backend="reference")
    single = torch.finfo(torch.float32)  # float64 until the end: one rounding
    torch.testing.assert_close(weights, exact.float(), rtol=single.eps, atol=single.smallest_normal * single.eps)


def test_a_token_is_the_same_bits_alone_or_in_a_batch_and_in_every_run() -> None:
    query, sub_keys = torch.randn(19, 2, 6), torch.randn(2, 2, 50, 3)
    weights, ids = retrieve(query, sub_keys, 5, "softmax")
    for few in (7, 16, 19):
        parts = [retrieve(part, sub_keys, 5, "softmax") for part in query.split(few)]
        assert torch.equal(torch.cat([part[0] for part in parts]), weights)
        assert torch.equal(torch.cat([part[1] for part in parts]), ids)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["query", "sub_keys", "all of the query", "all of the sub-keys"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_values_that_are_not_finite(weighting: str, where: str, bad: float) -> None:
    query, sub_keys = torch.randn(3, 2, 6), torch.randn(2, 1, 20, 3)
    if where.startswith("all"):
        (query if "query" in where else sub_keys).fill_(bad)
    elif where == "query":
        query[1, 1, 3] = bad
    else:
        sub_keys[0, 0, 7, 2] = bad
    weights, ids = retrieve(query, sub_keys, 5, weighting)
    expected, expected_ids = api.retrieve(query, sub_keys, 5, weighting=weighting, backend="reference")
    assert ((ids >= 0) & (ids < 400)).all()
    assert torch.equal(weights.isnan().any(dim=-1), expected.isnan().any(dim=-1))
    finite = api.retrieve(query, sub_keys, 5, weighting="none", backend="reference")[0].isfinite().all(dim=-1)
    assert torch.equal(ids[finite], expected_ids[finite])
    torch.testing.assert_close(weights[finite], expected[finite])
    for row in ids.flatten(0, 1).tolist():
        assert len(set(row)) == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(dtype: torch.dtype) -> None:
    query, sub_keys = torch.randn(9, 2, 12).to(dtype), torch.randn(2, 1, 20, 6).to(dtype)
    weights, ids = retrieve(query, sub_keys, 5)
    assert weights.dtype == torch.float32
    assert torch.equal(ids, exhaustive_search(query, sub_keys, 5)[0])


def test_arguments_need_not_be_contiguous() -> None:
    query, sub_keys = torch.randn(2, 12, 9).permute(2, 0, 1), torch.randn(2, 1, 6, 20).transpose(2, 3)
    weights, ids = retrieve(query, sub_keys, 5)
    same = retrieve(query.contiguous(), sub_keys.contiguous(), 5)
    assert torch.equal(weights, same[0])
    assert torch.equal(ids, same[1])


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_nothing_is_read_or_written_beside_the_tensors(weighting: str) -> None:
    for tokens, heads, sets, n, k, half in ((3, 2, 1, 5, 3, 3), (17, 1, 1, 9, 9, 1)):
        query, sub_keys = torch.randn(tokens, heads, 2 * half), torch.randn(2, sets, n, half)
        expected = retrieve(query, sub_keys, k, weighting)
        with Guarded() as guarded:
            found = retrieval.retrieve(
                between_poison(query.to(DEVICE)), between_poison(sub_keys.to(DEVICE)), k, weighting
            )
        guarded.assert_kept()
        assert torch.equal(found[0].cpu(), expected[0])
        assert torch.equal(found[1].cpu(), expected[1])


def test_no_tokens() -> None:
    weights, ids = retrieve(torch.empty(0, 2, 8), torch.randn(2, 1, 6, 4), 3)
    assert weights.shape == ids.shape == (0, 2, 3)


@what_does_not_fit
def test_the_operator_refuses_arguments_that_do_not_fit(query: Tensor, sub_keys: Tensor, k: int) -> None:
    with pytest.raises(ValueError, match=r"query .* and sub_keys .* do not fit, or k is not in 1 .. n"):
        retrieval.retrieve(query, sub_keys, k, "softmax")


def test_more_sub_keys_than_registers_hold_are_refused() -> None:
    query, sub_keys = torch.zeros(1, 1, 2, device=DEVICE), torch.zeros(2, 1, MOST_SUB_KEYS + 1, 1, device=DEVICE)
    with pytest.raises(ValueError, match=r"backend is 'triton', but there are 8193 sub-keys per half, .* up to 8192"):
        api.retrieve(query, sub_keys, 1, backend="triton")
    with pytest.raises(ValueError, match="there are 8193 sub-keys per half"):
        retrieval.retrieve(query, sub_keys, 1, "softmax")
