"""Gradients of chosen entries alone, sparse and dense."""

import pytest
import torch
from torch import nn

from peerlm.optim.restrict import restrict_gradient

KEEP = torch.tensor([True, False, True, False, False])


@pytest.mark.parametrize("sparse", [False, True])
def test_only_what_is_kept_has_a_gradient(sparse: bool) -> None:
    parameter = nn.Parameter(torch.ones(5, 2, 3))
    ids = torch.tensor([[4, 0, 1, 4, 0]])  # not coalesced, as a sum over micro-batches is
    values = torch.randn(5, 2, 3)
    gradient = torch.sparse_coo_tensor(ids, values, parameter.shape, check_invariants=True)
    parameter.grad = gradient if sparse else gradient.to_dense()
    restrict_gradient(parameter, KEEP)
    assert parameter.grad is not None
    assert parameter.grad.is_sparse == sparse
    expected = gradient.to_dense()
    expected[[1, 3, 4]] = 0
    found = parameter.grad.to_dense() if sparse else parameter.grad
    torch.testing.assert_close(found, expected)
    if sparse:
        assert parameter.grad.coalesce().indices().tolist() == [[0]]


def test_entries_along_another_dimension() -> None:
    parameter = nn.Parameter(torch.ones(2, 5))
    parameter.grad = torch.ones(2, 5)
    restrict_gradient(parameter, KEEP, dim=1)
    assert parameter.grad.tolist() == [[1, 0, 1, 0, 0]] * 2


def test_without_a_gradient_nothing_happens() -> None:
    parameter = nn.Parameter(torch.ones(5))
    restrict_gradient(parameter, KEEP)
    assert parameter.grad is None


def test_what_does_not_fit_is_refused() -> None:
    parameter = nn.Parameter(torch.ones(5, 5))
    for keep in (KEEP[:4], KEEP.float(), KEEP[None]):
        with pytest.raises(ValueError, match="give one bool for each of the 5 entries along dimension 0"):
            restrict_gradient(parameter, keep)
    parameter.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 5), (5, 5), check_invariants=True)
    with pytest.raises(ValueError, match="can be restricted along dimension 0, not 1"):
        restrict_gradient(parameter, KEEP, dim=1)
