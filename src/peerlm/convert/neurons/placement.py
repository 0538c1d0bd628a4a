"""Which neuron goes to which place of the index, so that neurons that are needed together share sub-keys.

A product key's score is a sum, one term for its row of the grid and one for its column. So a grid can only hold neurons
whose predictors nearly are such sums. Finding the best arrangement is additive quantisation (Babenko 2014) in which
every pair of codes is used once. Shape suffixes: N = H n n places of H grids, E size of a predictor.
"""

import torch
from torch import Tensor

MAX_COMPARED = 1024
"""Neurons compared with each other in one sweep: what a sweep costs is this squared, however many there are."""
START_TEMPERATURE = 0.3
"""Temperature of the first sweep, in shares of the mean squared distance of a predictor from the mean of all."""


def grid_means(vectors_NE: Tensor, heads: int, n: int) -> tuple[Tensor, Tensor]:
    """The sums r_i + c_j that are nearest to a grid's vectors: rows and columns, each (heads, n, E)."""
    grids_HnnE = vectors_NE.view(heads, n, n, -1)
    rows_HnE, columns_HnE = grids_HnnE.mean(dim=2), grids_HnnE.mean(dim=1)
    return rows_HnE, columns_HnE - columns_HnE.mean(dim=1, keepdim=True)


def misfit(vectors_NE: Tensor, heads: int, n: int) -> float:
    """How far vectors in this order are from sums of rows and columns: the share of their variance that is left."""
    left = (vectors_NE - _sums(vectors_NE, heads, n)).square().sum()
    return (left / _variance(vectors_NE).clamp(min=torch.finfo(left.dtype).tiny)).item()


@torch.no_grad()
def place_neurons(vectors_NE: Tensor, heads: int, n: int, *, sweeps: int = 300, seed: int = 0) -> Tensor:
    """An order in which `vectors_NE[order]` is nearly a sum of a row's and a column's vector, in each of the grids.

    Neurons are sorted into grids, rows and columns by principal components. Then pairs of them swap places, in sweeps
    that begin at a temperature and end without one (simulated annealing); rows' and columns' vectors are the means
    after each sweep. The best order of all sweeps is taken. Deterministic from the seed.

    Args:
        vectors_NE: predictors, (N, E) with N = heads * n * n.
        heads: grids.
        n: rows and columns of each.
        sweeps: sweeps of swaps; with 0 the sorted order is returned.
        seed: of the pairs that are compared, and of swaps at a temperature.

    Returns:
        (N,) int64, a permutation: place p gets neuron order[p].
    """
    generator = torch.Generator().manual_seed(seed)
    order_N = _sorted_order(vectors_NE, heads, n)
    best_order, best_misfit = order_N, misfit(vectors_NE[order_N], heads, n)
    scale = START_TEMPERATURE * _variance(vectors_NE) / len(vectors_NE)
    for sweep in range(sweeps):
        places = torch.randperm(len(order_N), generator=generator)[:MAX_COMPARED].to(order_N.device)
        order_N = _swap(vectors_NE, order_N, places, heads, n, scale * (1 - (sweep + 1) / sweeps), generator)
        now = misfit(vectors_NE[order_N], heads, n)
        if now < best_misfit:
            best_order, best_misfit = order_N, now
    return best_order


def _swap(
    vectors_NE: Tensor,
    order_N: Tensor,
    places: Tensor,
    heads: int,
    n: int,
    temperature: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Swap the neurons at those of these places that gain most by it, each with the other's first choice."""
    placed_NE = vectors_NE[order_N]
    targets = _sums(placed_NE, heads, n)[places]
    cost = torch.cdist(placed_NE[places], targets).square()  # of the neuron at place a in place b
    stays = cost.diagonal()
    gain = stays[:, None] + stays - cost - cost.T
    luck = torch.empty(gain.shape, dtype=gain.dtype).exponential_(generator=generator).to(gain.device).triu(1)
    gain += temperature * (luck + luck.T)
    gain.fill_diagonal_(0.0)
    most, partner = gain.max(dim=1)
    index = torch.arange(len(places), device=places.device)
    chosen = (partner[partner] == index) & (most > 0) & (index < partner)
    here, there = places[chosen], places[partner[chosen]]
    order_N = order_N.clone()
    order_N[here], order_N[there] = order_N[there], order_N[here]
    return order_N


def _sums(vectors_NE: Tensor, heads: int, n: int) -> Tensor:
    rows_HnE, columns_HnE = grid_means(vectors_NE, heads, n)
    return (rows_HnE[:, :, None] + columns_HnE[:, None]).flatten(0, 2)


def _variance(vectors_NE: Tensor) -> Tensor:
    return (vectors_NE - vectors_NE.mean(dim=0)).square().sum()


def _sorted_order(vectors_NE: Tensor, heads: int, n: int) -> Tensor:
    """Grids, then rows, by bisection along principal components; columns in each grid by that of what rows leave."""
    everything = torch.arange(len(vectors_NE), device=vectors_NE.device)
    grids = []
    for grid in _bisect(vectors_NE, everything, heads):
        rows_nn = torch.stack(_bisect(vectors_NE, grid, n))
        within_nnE = vectors_NE[rows_nn] - vectors_NE[rows_nn].mean(dim=1, keepdim=True)
        along = within_nnE @ _first_component(within_nnE.flatten(0, 1))
        grids.append(rows_nn.gather(1, along.argsort(dim=1, stable=True)))
    return torch.stack(grids).flatten()


def _bisect(vectors_NE: Tensor, ids: Tensor, parts: int) -> list[Tensor]:
    """Equal parts of these ids, cut across the first principal component of each half again and again."""
    if parts == 1:
        return [ids]
    centred = vectors_NE[ids] - vectors_NE[ids].mean(dim=0)
    ids = ids[(centred @ _first_component(centred)).argsort(stable=True)]
    first = parts // 2
    cut = len(ids) // parts * first
    return _bisect(vectors_NE, ids[:cut], first) + _bisect(vectors_NE, ids[cut:], parts - first)


def _first_component(centred: Tensor) -> Tensor:
    """The direction of most variance, (E,), its sign fixed by its largest entry."""
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    direction = vectors[:, -1]
    return direction * direction[direction.abs().argmax()].sign()
