"""Inner products of tokens with their rows, and experts of unequal widths made of them, against float64."""

import pytest
import torch
from torch import Tensor

from peerlm.ops import api
from peerlm.ops.cpu import native
from peerlm.testing import assert_within_budget

BACKENDS = [
    "reference",
    "bag",
    "triton",
    pytest.param("cpu", marks=pytest.mark.skipif(bool(native._reason), reason="not built")),
]


def draw(tokens: int, per_token: int, dim: int, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs x (T, D), ids (T, P) with repetitions, values (N, D)."""
    ids = torch.randint(0, num_rows, (tokens, per_token))
    ids[:, 0] = ids[0, 0]
    return torch.randn(tokens, dim), ids, torch.randn(num_rows, dim)


def products_and_gradients(x: Tensor, ids: Tensor, values: Tensor, **options: object) -> list[Tensor]:
    """The products, and the gradients of x and values of a fixed weighted sum of them."""
    leaves = x.clone().requires_grad_(), values.clone().requires_grad_()
    dots = api.dot_values(leaves[0], ids, leaves[1], **options)  # type: ignore[arg-type]
    coefficients = torch.linspace(-1, 1, dots.numel()).view(dots.shape).to(dots)
    (dots * coefficients).sum().backward()
    grad = leaves[1].grad
    assert grad is not None
    assert leaves[0].grad is not None
    return [dots.detach(), leaves[0].grad, grad.to_dense() if grad.is_sparse else grad]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tokens", "per_token", "dim", "num_rows"), [(1, 1, 1, 1), (63, 5, 17, 9), (8, 33, 64, 256)])
def test_products_and_gradients_are_those_of_a_loop(
    backend: str, tokens: int, per_token: int, dim: int, num_rows: int
) -> None:
    x, ids, values = draw(tokens, per_token, dim, num_rows)
    by_loops = []
    for dtype in (torch.float32, torch.float64):
        leaves = x.to(dtype, copy=True).requires_grad_(), values.to(dtype, copy=True).requires_grad_()
        dots = torch.stack(
            [torch.stack([leaves[0][t] @ leaves[1][i] for i in row]) for t, row in enumerate(ids.tolist())]
        )
        coefficients = torch.linspace(-1, 1, dots.numel()).view(dots.shape)
        by_loops.append([dots, *torch.autograd.grad((dots * coefficients).sum(), leaves)])
    assert_within_budget(products_and_gradients(x, ids, values, backend=backend), *by_loops)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_row_gradients_are_sparse_and_equal_to_dense_ones(backend: str) -> None:
    x, ids, values = draw(20, 4, 8, 50)
    leaf = values.clone().requires_grad_()
    api.dot_values(x, ids, leaf, backend=backend, row_gradients=True).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.is_sparse
    assert leaf.grad.coalesce().indices().flatten().tolist() == ids.unique().tolist()
    dense = products_and_gradients(x, ids, values, backend=backend)
    sparse = products_and_gradients(x, ids, values, backend=backend, row_gradients=True)
    exact = products_and_gradients(x.double(), ids, values.double(), backend="reference")
    assert_within_budget(sparse, dense, exact)


def test_experts_of_equal_width_are_those_of_mix_experts() -> None:
    x, ids, _ = draw(12, 6, 10, 30)
    rows, weights = torch.randn(30, 2, 10), torch.rand(12, 6)
    made = api.mix_values(weights * api.dot_values(x, ids, rows[:, 0]).relu(), ids, rows[:, 1])
    plain = api.mix_experts(x, weights, ids, rows, activation="relu")
    exact = api.mix_experts(x.double(), weights.double(), ids, rows.double(), activation="relu", backend="reference")
    assert_within_budget(made, plain, exact)


def test_bag_has_no_sparse_gradients() -> None:
    x, ids, values = draw(2, 2, 4, 4)
    with pytest.raises(ValueError, match="'bag', but embedding bags have no sparse row gradients; choose 'auto'"):
        api.dot_values(x, ids, values, backend="bag", row_gradients=True)
