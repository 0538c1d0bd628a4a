"""Gradients of retrieval by Triton's kernels against float64 autograd of the definition."""

import pytest
import torch
from torch import Tensor

from peerlm.ops import api
from peerlm.ops.functions import WEIGHTINGS
from peerlm.ops.pairing import PAIRINGS
from peerlm.ops.triton import retrieval
from peerlm.ops.triton.runtime import OPERATORS
from peerlm.testing import assert_within_budget, exhaustive_scores

from .guards import Guarded, between_poison

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def inputs(tokens: int, heads: int, sets: int, n: int, half: int, size: float = 1.0) -> list[Tensor]:
    query, sub_keys = size * torch.randn(tokens, heads, 2 * half), torch.randn(2, sets, n, half) * half**-0.5
    return [tensor.to(DEVICE).requires_grad_() for tensor in (query, sub_keys)]


@pytest.mark.parametrize("key_heads", [1, 3])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_gradients_are_within_the_error_budget(weighting: str, key_heads: int) -> None:
    for tokens, n, k, half, pairing in ((5, 20, 5, 9, "row-major"), (3, 4, 4, 1, "shells"), (1, 3, 1, 40, "shells")):
        leaves = inputs(tokens, 3, key_heads, n, half)
        coefficients = torch.randn(tokens, 3, k, device=DEVICE)
        wide = [tensor.detach().double().requires_grad_() for tensor in leaves]
        weights, ids = api.retrieve(*leaves, k, weighting=weighting, pairing=pairing, backend="triton")
        exact, exact_ids = api.retrieve(*wide, k, weighting=weighting, pairing=pairing, backend="reference")
        assert torch.equal(ids, exact_ids)
        plain = WEIGHTINGS[weighting](exhaustive_scores(*leaves, pairing).gather(-1, ids))
        results = [
            (found, *torch.autograd.grad((found * coefficients).sum(), of))
            for found, of in ((weights, leaves), (plain, leaves), (exact, wide))
        ]
        assert_within_budget(*results)


def test_a_sigmoid_near_one_has_a_gradient() -> None:
    query, sub_keys = torch.full((1, 1, 2), 3.0), torch.full((2, 1, 1, 1), 4.0)  # its weight is 1 - 4e-11
    leaves = [tensor.to(DEVICE).requires_grad_() for tensor in (query, sub_keys)]
    wide = [tensor.detach().double().requires_grad_() for tensor in leaves]
    found, exact = (
        torch.autograd.grad(api.retrieve(*of, 1, weighting="sigmoid", backend=backend)[0].sum(), of)
        for of, backend in ((leaves, "triton"), (wide, "reference"))
    )
    for one, right in zip(found, exact, strict=True):
        assert right.abs().min() > 1e-11
        torch.testing.assert_close(one.double(), right, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [-20.0, 20.0])
def test_a_sigmoid_of_scores_of_any_size_has_a_gradient_of_zero_at_least(size: float) -> None:
    leaves = [torch.full(shape, size).to(DEVICE).requires_grad_() for shape in ((1, 1, 2), (2, 1, 1, 1))]
    with torch.no_grad():
        leaves[0].fill_(40.0)  # scores of 1600 and -1600
    weights, _ = api.retrieve(*leaves, 1, weighting="sigmoid", backend="triton")
    for gradient in torch.autograd.grad(weights.sum(), leaves):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_sub_keys_that_many_entries_name_are_summed_in_chunks_to_the_same_bits() -> None:
    leaves = inputs(20, 1, 1, 16, 1)
    with torch.no_grad():  # all entries name the first sub-key of a half: more than a chunk of 256
        leaves[0][..., 0] = 1.0
        leaves[1][0] = -100.0
        leaves[1][0, 0, 3] = 100.0
    found = []
    for _ in range(2):
        weights, ids = api.retrieve(*leaves, 16, weighting="none", backend="triton")
        assert (ids // 16 == 3).all()
        found.append(torch.autograd.grad(weights.square().sum(), leaves))
    wide = [tensor.detach().double().requires_grad_() for tensor in leaves]
    exact, _ = api.retrieve(*wide, 16, weighting="none", backend="reference")
    expected = torch.autograd.grad(exact.square().sum(), wide)
    for first, second, right in zip(*found, expected, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first.double(), right, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("key_heads", [1, 2])
def test_pairings_have_the_same_gradients(key_heads: int) -> None:
    leaves = inputs(4, 2, key_heads, 30, 3)
    results = []
    for pairing in PAIRINGS:
        weights, _ = api.retrieve(*leaves, 5, weighting="sigmoid", pairing=pairing, backend="triton")
        results.append(torch.autograd.grad(weights.square().sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_nothing_is_read_or_written_beside_the_tensors(weighting: str) -> None:
    for tokens, heads, sets, n, k, half in ((3, 2, 2, 5, 3, 3), (2, 1, 1, 9, 9, 17)):
        query, sub_keys = (tensor.detach() for tensor in inputs(tokens, heads, sets, n, half))
        weights, ids = retrieval.retrieve(query, sub_keys, k, weighting)
        arguments = torch.randn(tokens, heads, k, device=DEVICE), weights, ids, query, sub_keys
        expected = retrieval.retrieve_backward(*arguments, weighting)
        with Guarded() as guarded:
            found = retrieval.retrieve_backward(*map(between_poison, arguments), weighting)
        guarded.assert_kept()
        for one, right in zip(found, expected, strict=True):
            assert right.isfinite().all()
            assert torch.equal(one, right)


@pytest.mark.parametrize("bad_id", [-1, 36, 2**40])
def test_an_id_of_no_expert_gives_nan(bad_id: int) -> None:
    weights, query, sub_keys = torch.rand(3, 2, 4), torch.ones(3, 2, 8), torch.ones(2, 1, 6, 4)
    ids = torch.zeros(3, 2, 4, dtype=torch.int64)
    ids[2, 1, 3] = bad_id
    tensors = [tensor.to(DEVICE) for tensor in (weights, weights, ids, query, sub_keys)]
    grad_query, grad_sub_keys = retrieval.retrieve_backward(*tensors, "none")
    assert grad_query[2, 1].isnan().all()
    assert not grad_query[:2].isnan().any()
    assert grad_sub_keys.isnan().any()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_that_are_not_finite_have_gradients_that_are_not(weighting: str) -> None:
    query, sub_keys = inputs(3, 2, 1, 6, 2)
    with torch.no_grad():
        query[1, 1, 3] = float("nan")
    weights, _ = api.retrieve(query, sub_keys, 4, weighting=weighting, backend="triton")
    grad_query, _ = torch.autograd.grad(weights.sum(), (query, sub_keys))
    assert torch.equal(grad_query.isnan().any(dim=-1), (weights.isnan().any(dim=-1) & (weighting != "none")))


def test_no_tokens() -> None:
    query, sub_keys = inputs(0, 2, 1, 6, 4)
    weights, _ = api.retrieve(query, sub_keys, 3, backend="triton")
    weights.sum().backward()
    assert query.grad.shape == query.shape
    assert torch.equal(sub_keys.grad, torch.zeros_like(sub_keys))


@pytest.mark.parametrize(("weighting", "key_heads"), [("softmax", 1), ("sigmoid", 2)])
def test_opcheck(weighting: str, key_heads: int) -> None:
    query, sub_keys = inputs(2, 2, key_heads, 3, 1)
    operators = OPERATORS.ops
    torch.library.opcheck(operators.retrieve.default, (query, sub_keys, 2, weighting, "shells"))
    query, sub_keys = query.detach(), sub_keys.detach()
    weights, ids = operators.retrieve(query, sub_keys, 2, weighting, "shells")
    backward = torch.randn(2, 2, 2, device=DEVICE), weights, ids, query, sub_keys, weighting, "shells"
    torch.library.opcheck(operators.retrieve_backward.default, backward)


@pytest.mark.filterwarnings("default")  # torch.compile warns of what it does
def test_compiled_and_exported_in_one_graph() -> None:
    leaves = inputs(4, 2, 1, 6, 2)

    class Retrieve(torch.nn.Module):
        def forward(self, query: Tensor, sub_keys: Tensor) -> tuple[Tensor, Tensor]:
            return api.retrieve(query, sub_keys, 3, backend="triton")

    expected = Retrieve()(*leaves)
    gradients = torch.autograd.grad(expected[0].square().sum(), leaves)
    compiled = torch.compile(Retrieve(), fullgraph=True, backend="aot_eager")(*leaves)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(Retrieve(), tuple(leaves), dynamic_shapes=({0: tokens}, None))
    for found in (compiled, program.module()(*leaves)):
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
    found = torch.autograd.grad(compiled[0].square().sum(), leaves)
    assert all(torch.equal(one, right) for one, right in zip(found, gradients, strict=True))
