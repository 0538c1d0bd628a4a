"""The query's product by oneDNN is PyTorch's, and so are its first and second gradients."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from peerlm.ops import api
from peerlm.ops.cpu import onednn
from peerlm.testing import assert_within_budget

needs_onednn = pytest.mark.skipif(not onednn.supported(torch.empty(0)), reason="this PyTorch was built without oneDNN")


def inputs(tokens: int, dim: int, features: int) -> tuple[Tensor, Tensor]:
    return torch.randn(tokens, dim, requires_grad=True), torch.randn(features, dim, requires_grad=True)


@pytest.mark.parametrize(("tokens", "dim", "features"), [(0, 8, 4), (1, 5, 3), (8, 1, 1), (33, 12, 7), (300, 96, 32)])
def test_products_and_gradients_are_those_of_float64(tokens: int, dim: int, features: int) -> None:
    x, weight = inputs(tokens, dim, features)
    grad_y = torch.randn(tokens, features)
    y = onednn.linear(x, weight)
    found = y, *torch.autograd.grad(y, [x, weight], grad_y)
    plain, exact = (
        (a @ w.T, grad @ w, grad.T @ a)
        for a, w, grad in ((x, weight, grad_y), (x.double(), weight.double(), grad_y.double()))
    )
    assert_within_budget(found, plain, exact)


def test_second_derivatives_exist() -> None:
    leaves = inputs(16, 6, 5)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    found = []
    for product, (x, weight) in ((onednn.linear, leaves), (functional.linear, leaves), (functional.linear, wide)):
        (grad_x,) = torch.autograd.grad(product(x, weight).tanh().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad_x.square().sum(), [x, weight]))
    assert_within_budget(*found)


@needs_onednn
def test_the_operator_obeys_the_rules_of_operators() -> None:
    results = torch.library.opcheck(torch.ops.peerlm.linear, inputs(20, 6, 5))
    assert set(results.values()) == {"SUCCESS"}


@needs_onednn
def test_one_graph_takes_any_number_of_tokens() -> None:
    compiled = torch.compile(onednn.linear, fullgraph=True, dynamic=True, backend="aot_eager")
    weight = torch.randn(5, 6)
    for tokens in (20, 3, 9):
        x = torch.randn(tokens, 6)
        assert_within_budget(compiled(x, weight), x @ weight.T, x.double() @ weight.double().T)


def test_other_tensors_are_left_to_pytorch() -> None:
    x, weight = inputs(20, 6, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert api.linear(x, weight).dtype == torch.bfloat16
    wide = api.linear(x.double(), weight.double())
    assert torch.equal(wide, functional.linear(x.double(), weight.double()))
    assert torch.equal(api.linear(x, weight, backend="reference"), functional.linear(x, weight))
    assert api.linear(x.to("meta"), weight.to("meta")).shape == (20, 5)
    with pytest.raises(ValueError, match="backend is 'fast'; choose one of"):
        api.linear(x, weight, backend="fast")
