"""Placement finds the arrangement that a grid can hold, and only moves neurons."""

import pytest
import torch

from peerlm.convert.neurons.placement import grid_means, misfit, place_neurons


def planted(heads: int, n: int, noise: float = 0.0) -> torch.Tensor:
    """Vectors that are sums of a row's and a column's vector, in an order that hides it."""
    rows, columns = torch.randn(heads, n, 1, 12), torch.randn(heads, 1, n, 12)
    vectors = (rows + columns + 3 * torch.randn(heads, 1, 1, 12)).flatten(0, 2)
    vectors = vectors + noise * torch.randn_like(vectors)
    return vectors[torch.randperm(len(vectors))].double()


@pytest.mark.parametrize(("heads", "n"), [(1, 6), (2, 5), (3, 4)])
def test_a_hidden_arrangement_is_nearly_found(heads: int, n: int) -> None:
    vectors = planted(heads, n)
    order = place_neurons(vectors, heads, n)
    assert sorted(order.tolist()) == list(range(heads * n * n))
    assert misfit(vectors[order], heads, n) < 0.3 * misfit(vectors, heads, n)


def test_sweeps_improve_on_sorting() -> None:
    vectors = torch.randn(2 * 64, 10)
    sorted_only, annealed = (place_neurons(vectors, 2, 8, sweeps=sweeps) for sweeps in (0, 200))
    assert misfit(vectors[annealed], 2, 8) < 0.95 * misfit(vectors[sorted_only], 2, 8)
    assert misfit(vectors[sorted_only], 2, 8) < misfit(vectors, 2, 8)


def test_it_is_a_function_of_the_seed() -> None:
    vectors = torch.randn(32, 10)
    first, again, other = (place_neurons(vectors, 2, 4, sweeps=50, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_means_are_the_nearest_sums() -> None:
    vectors = torch.randn(2, 3, 3, 4, dtype=torch.float64)
    rows, columns = grid_means(vectors.flatten(0, 2), 2, 3)
    design = torch.zeros(9, 6, dtype=torch.float64)
    for place in range(9):
        design[place, place // 3] = design[place, 3 + place % 3] = 1
    for head in range(2):
        nearest = design @ torch.linalg.pinv(design) @ vectors[head].flatten(0, 1)
        sums = (rows[head][:, None] + columns[head]).flatten(0, 1)
        torch.testing.assert_close(sums, nearest)


def test_neurons_that_are_all_alike_have_a_place() -> None:
    assert sorted(place_neurons(torch.zeros(16, 3), 1, 4, sweeps=3).tolist()) == list(range(16))
