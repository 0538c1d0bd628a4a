"""Native retrieval against exhaustive search over all N experts in float64."""

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from peerlm.errors import UserError
from peerlm.ops import api
from peerlm.ops.cpu import kernels, native
from peerlm.ops.functions import WEIGHTINGS
from peerlm.ops.pairing import PAIRINGS
from peerlm.ops.scoring import half_scores
from peerlm.testing import assert_within_budget, exhaustive_scores, exhaustive_search

from .retrieval_cases import FEW_TOKENS, KINDS, against_bfloat16, cases, what_does_not_fit

pytestmark = pytest.mark.skipif(bool(native._reason), reason=native._reason)


PRECISIONS = ("int8", "bf16", "fp32")


@pytest.fixture(params=PRECISIONS)
def scores_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The precision of the first scores, where the machine leaves a choice."""
    monkeypatch.setenv("PEERLM_SCORES", request.param)
    return request.param


def assert_exhaustive(query: Tensor, sub_keys: Tensor, k: int, pairing: str) -> None:
    """By first scores of each precision: the search takes longer than what it judges."""
    expected_ids, scores = exhaustive_search(query, sub_keys, k, pairing)
    single = torch.finfo(torch.float32)
    for precision in PRECISIONS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PEERLM_SCORES", precision)
            weights, ids = api.retrieve(query, sub_keys, k, weighting="none", pairing=pairing, backend="cpu")
        assert torch.equal(ids, expected_ids), precision
        # Sums in float64, rounded once: another order of them may tip that rounding to the next float32
        torch.testing.assert_close(weights, scores.float(), rtol=single.eps, atol=single.smallest_normal * single.eps)


@given(case=cases())
@settings(max_examples=60)
def test_ids_are_those_of_exhaustive_search(case: tuple[Tensor, Tensor, int, str]) -> None:
    assert_exhaustive(*case)


@pytest.mark.slow
@given(case=cases())
@settings(max_examples=500)
def test_ids_are_those_of_exhaustive_search_in_500_examples(case: tuple[Tensor, Tensor, int, str]) -> None:
    assert_exhaustive(*case)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [FEW_TOKENS, FEW_TOKENS + 1])
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_every_kind_of_values(kind: str, tokens: int, pairing: str) -> None:
    draw_query, query_size, draw_keys, keys_size = KINDS[kind]
    generator = torch.Generator().manual_seed(1)
    for n, k, half in ((40, 3, 16), (100, 8, 33), (31, 31, 5)):
        query = draw_query(generator, tokens, 2, 2 * half) * query_size
        assert_exhaustive(query, draw_keys(generator, 2, 1, n, half) * keys_size, k, pairing)


@pytest.mark.parametrize("tokens", [FEW_TOKENS, 64])
def test_what_bfloat16_misjudges_most_is_retrieved(tokens: int) -> None:
    for n, k in ((64, 1), (300, 1), (300, 2)):
        assert_exhaustive(*against_bfloat16(tokens, n), k, "row-major")


@pytest.mark.parametrize(("n", "k"), [(300, 16), (257, 64), (256, 1), (300, 300)])
@pytest.mark.parametrize("kind", ["normal", "integers that tie", "nearly equal sub-keys"])
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_many_sub_keys(n: int, k: int, kind: str, pairing: str) -> None:
    draw_query, query_size, draw_keys, keys_size = KINDS[kind]
    generator = torch.Generator().manual_seed(2)
    for tokens in (2, 13):
        query = draw_query(generator, tokens, 1, 64) * query_size
        assert_exhaustive(query, draw_keys(generator, 2, 1, n, 32) * keys_size, k, pairing)


@pytest.mark.parametrize("k", [1, 5, 9])
@pytest.mark.parametrize("tokens", [1, 30])
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_everything_tied_retrieves_the_lowest_ids(tokens: int, k: int, pairing: str, scores_of: str) -> None:
    query, sub_keys = torch.ones(tokens, 2, 6), torch.ones(2, 1, 9, 3)
    _, ids = api.retrieve(query, sub_keys, k, pairing=pairing, backend="cpu")
    assert ids.tolist() == [[list(range(k))] * 2] * tokens


def test_sums_that_tie_only_by_rounding_are_told_apart() -> None:
    # In float64 both sums round to 3e20; exactly, id 1 = 3e20 + 2e-8 is the higher one.
    query, sub_keys = torch.ones(1, 1, 2), torch.tensor([[[[3e20], [3e20]]], [[[1e-8], [2e-8]]]])
    _, ids = api.retrieve(query, sub_keys, 2, backend="cpu")
    assert ids.tolist() == [[[1, 3]]]


@pytest.mark.parametrize("key_heads", [1, 3])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("tokens", [3, 61])
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_weights_and_gradients(tokens: int, weighting: str, key_heads: int, pairing: str, scores_of: str) -> None:
    for n, k, half in ((37, 7, 9), (20, 20, 1), (16, 16, 16), (5, 1, 64), (64, 33, 20)):
        query, sub_keys = torch.randn(tokens, 3, 2 * half), torch.randn(2, key_heads, n, half) * half**-0.5
        coefficients = torch.randn(tokens, 3, k)
        wide = [tensor.double().requires_grad_() for tensor in (query, sub_keys)]
        leaves = [tensor.requires_grad_() for tensor in (query, sub_keys)]
        weights, ids = api.retrieve(*leaves, k, weighting=weighting, pairing=pairing, backend="cpu")
        exact, exact_ids = api.retrieve(*wide, k, weighting=weighting, pairing=pairing, backend="reference")
        assert torch.equal(ids, exact_ids)
        halves, places = half_scores(*leaves), PAIRINGS[pairing].sub_keys(ids, n)
        plain = WEIGHTINGS[weighting](halves[0].gather(-1, places[0]) + halves[1].gather(-1, places[1]))
        results = [
            (found, *torch.autograd.grad((found * coefficients).sum(), of))
            for found, of in ((weights, leaves), (plain, leaves), (exact, wide))
        ]
        assert_within_budget(*results)


@pytest.mark.parametrize("size", [1e-3, 30.0, 1e3])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_of_scores_of_any_size(weighting: str, size: float) -> None:
    query, sub_keys = size * torch.randn(9, 2, 8), torch.randn(2, 1, 12, 4)
    weights, _ = api.retrieve(query, sub_keys, 12, weighting=weighting, backend="cpu")
    exact, ids = api.retrieve(query.double(), sub_keys.double(), 12, weighting=weighting, backend="reference")
    plain = WEIGHTINGS[weighting](exhaustive_scores(query, sub_keys).gather(-1, ids))
    assert_within_budget(weights, plain, exact)
    # Scores are exact, so that exponents, below 88 where a float32 is not zero, are rounded once: small weights too
    single = torch.finfo(torch.float32)
    torch.testing.assert_close(weights, exact.float(), rtol=88 * single.eps, atol=88 * single.smallest_normal)


@pytest.mark.parametrize("key_heads", [1, 2])
def test_pairings_have_the_same_weights_and_gradients(key_heads: int) -> None:
    query, sub_keys = torch.randn(11, 2, 12), torch.randn(2, key_heads, 30, 6)
    results = []
    for pairing in PAIRINGS:
        leaves = [tensor.clone().requires_grad_() for tensor in (query, sub_keys)]
        weights, ids = api.retrieve(*leaves, 7, weighting="sigmoid", pairing=pairing, backend="cpu")
        gradients = torch.autograd.grad(weights.square().sum(), leaves)
        results.append((*PAIRINGS[pairing].sub_keys(ids, 30), weights, *gradients))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_token_is_the_same_bits_alone_or_in_a_batch(scores_of: str) -> None:
    query, sub_keys = torch.randn(70, 2, 48), torch.randn(2, 2, 50, 24)
    weights, ids = api.retrieve(query, sub_keys, 9, backend="cpu")
    for few in (1, 2, 4, 5, 7, 31):
        parts = [api.retrieve(part, sub_keys, 9, backend="cpu") for part in query.split(few)]
        assert torch.equal(torch.cat([part[0] for part in parts]), weights)
        assert torch.equal(torch.cat([part[1] for part in parts]), ids)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["query", "sub_keys", "all of the query", "all of the sub-keys"])
@pytest.mark.parametrize("tokens", [2, 17])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_values_that_are_not_finite(weighting: str, tokens: int, where: str, bad: float, scores_of: str) -> None:
    query, sub_keys = torch.randn(tokens, 2, 12), torch.randn(2, 1, 20, 6)
    if where.startswith("all"):
        (query if "query" in where else sub_keys).fill_(bad)
    elif where == "query":
        query[1, 1, 3] = bad
    else:
        sub_keys[0, 0, 7, 2] = bad
    leaves = [tensor.clone().requires_grad_() for tensor in (query, sub_keys)]
    weights, ids = api.retrieve(*leaves, 5, weighting=weighting, backend="cpu")
    expected, expected_ids = api.retrieve(query, sub_keys, 5, weighting=weighting, backend="reference")
    assert ((ids >= 0) & (ids < 400)).all()
    assert torch.equal(weights.isnan().any(dim=-1), expected.isnan().any(dim=-1))
    scores, _ = api.retrieve(query, sub_keys, 5, weighting="none", backend="reference")
    finite = scores.isfinite().all(dim=-1)
    assert torch.equal(ids[finite], expected_ids[finite])
    exact, _ = api.retrieve(query.double(), sub_keys.double(), 5, weighting=weighting, backend="reference")
    assert_within_budget(weights[finite], expected[finite], exact[finite])
    for row in ids.flatten(0, 1).tolist():
        assert len(set(row)) == 5
    weights.sum().backward()  # and no crash in the backward pass


def test_scores_of_another_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEERLM_SCORES", "int4")
    with pytest.raises(UserError, match="PEERLM_SCORES is 'int4'; set it to int8, bf16 or fp32"):
        api.retrieve(torch.ones(8, 1, 4), torch.ones(2, 1, 4, 2), 2, backend="cpu")


def test_large_sub_keys_are_compared_in_8_bits_unless_told_otherwise() -> None:
    has = native.module.has_scores
    assert kernels._scores(torch.empty(2, 1, 1024, 64)) == ("int8" if has("int8") else "fp32")
    assert kernels._scores(torch.empty(2, 8, 256, 128)) == ("bf16" if has("bf16") else "fp32")


def test_no_tokens() -> None:
    query = torch.empty(0, 2, 8, requires_grad=True)
    sub_keys = torch.randn(2, 1, 6, 4, requires_grad=True)
    weights, ids = api.retrieve(query, sub_keys, 3, backend="cpu")
    assert weights.shape == ids.shape == (0, 2, 3)
    weights.sum().backward()
    assert torch.equal(sub_keys.grad, torch.zeros_like(sub_keys))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(dtype: torch.dtype) -> None:
    query, sub_keys = torch.randn(9, 2, 12).to(dtype), torch.randn(2, 1, 20, 6).to(dtype).requires_grad_()
    weights, ids = api.retrieve(query, sub_keys, 5, backend="cpu")
    assert weights.dtype == torch.float32
    assert torch.equal(ids, exhaustive_search(query, sub_keys, 5)[0])
    weights.square().sum().backward()
    assert sub_keys.grad.dtype == dtype


def test_arguments_need_not_be_contiguous() -> None:
    query, sub_keys = torch.randn(2, 12, 9).permute(2, 0, 1), torch.randn(2, 1, 6, 20).transpose(2, 3)
    weights, ids = api.retrieve(query, sub_keys, 5, backend="cpu")
    same = api.retrieve(query.contiguous(), sub_keys.contiguous(), 5, backend="cpu")
    assert torch.equal(weights, same[0])
    assert torch.equal(ids, same[1])


@what_does_not_fit
def test_kernels_refuse_arguments_that_do_not_fit(query: Tensor, sub_keys: Tensor, k: int) -> None:
    """`api` refuses them too, for every backend; an operator may be called without it."""
    api.load_backends()
    with pytest.raises(ValueError, match=r"query .* and sub_keys .* do not fit, or k is not in 1 .. n"):
        torch.ops.peerlm.retrieve(query, sub_keys, k, "softmax")


@pytest.mark.parametrize("bad_id", [-1, 36])
def test_backward_refuses_ids_out_of_range(bad_id: int) -> None:
    weights, query, sub_keys = torch.rand(3, 2, 4), torch.ones(3, 2, 8), torch.ones(2, 1, 6, 4)
    ids = torch.zeros(3, 2, 4, dtype=torch.int64)
    ids[2, 1, 3] = bad_id
    api.load_backends()
    with pytest.raises(IndexError, match=rf"expert id {bad_id} is not in 0 .. 35"):
        torch.ops.peerlm.retrieve_backward(weights, weights, ids, query, sub_keys, "softmax")
