"""The index of neurons: equal to exhaustive search, each neuron at most once, weights of one with a gradient."""

import pytest
import torch

from peerlm.convert.neurons.keys import NeuronKeys
from peerlm.testing import all_keys

DIM = 6


def small_index(**settings: int) -> NeuronKeys:
    index = NeuronKeys(DIM, **({"sub_keys": 3, "heads": 4, "retrieved": 5, "key_dim": 4} | settings)).double()
    with torch.no_grad():
        index.query_proj.bias.normal_()
    return index


@pytest.mark.parametrize("retrieved", [1, 3, 4, 20, 36])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_retrieval_equals_exhaustive_search_over_all_heads(backend: str, retrieved: int) -> None:
    index = NeuronKeys(DIM, sub_keys=3, heads=4, retrieved=retrieved, key_dim=4, backend=backend).double()
    x = torch.randn(9, DIM).double()
    query_THX = (x @ index.query_proj.weight.T + index.query_proj.bias).view(9, 4, 4)
    scores_TN = torch.einsum("thx,hNx->thN", query_THX, all_keys(index.sub_keys)).flatten(1).detach()
    torch.testing.assert_close(index.scores(x).detach(), scores_TN)
    weights, ids = index(x)
    assert ids.shape == weights.shape == (9, 1, retrieved)
    assert ids[:, 0].tolist() == scores_TN.argsort(dim=-1, descending=True)[:, :retrieved].tolist()
    assert (weights == 1).all()


def test_no_neuron_comes_twice_and_equal_scores_go_by_id() -> None:
    for retrieved in (3, 7, 36):
        index = small_index(retrieved=retrieved)
        _, ids = index(torch.randn(2, 5, DIM).double())
        assert all(len(set(token)) == retrieved for token in ids.reshape(-1, retrieved).tolist())
        with torch.no_grad():
            index.sub_keys.zero_()
        _, ids = index(torch.randn(1, DIM).double())
        assert ids.flatten().tolist() == list(range(retrieved))


@pytest.mark.parametrize("retrieved", [3, 7])
def test_weights_of_one_have_the_gradient_of_a_sigmoid_above_the_lowest_score(retrieved: int) -> None:
    index, x = small_index(retrieved=retrieved), torch.randn(1, DIM).double()
    weights, ids = index(x)
    assert (weights == 1).all()
    assert weights.requires_grad
    (gradient,) = torch.autograd.grad(weights[0, 0, 0], index.query_proj.bias)
    scores = index.scores(x)[0]
    best, lowest = scores[ids[0, 0, 0]], scores[ids[0, 0, -1]].detach()
    (expected,) = torch.autograd.grad(torch.sigmoid(best - lowest), index.query_proj.bias)
    assert expected.abs().sum() > 0
    torch.testing.assert_close(gradient, expected)


def test_few_are_found_without_a_score_for_every_neuron(monkeypatch: pytest.MonkeyPatch) -> None:
    index, x = small_index(retrieved=3), torch.randn(2, DIM).double()
    monkeypatch.setattr(index, "scores", None)
    index(x)
    index.retrieved = 4
    with pytest.raises(TypeError):
        index(x)


def test_half_precision_scores_in_single() -> None:
    index = small_index().bfloat16()
    x = torch.randn(3, DIM).bfloat16()
    assert index.scores(x).dtype == torch.float32
    assert index(x)[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"key_dim": 5}, "key_dim is 5; .* even number"),
        ({"heads": 0}, "heads is 0; it must be at least 1"),
        ({"retrieved": 37}, "retrieved is 37, more than the 36 neurons"),
        ({"retrieved": 0}, "retrieved is 0; it must be at least 1"),
    ],
    ids=str,
)
def test_impossible_settings(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_index(**settings)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend is 'gpu'; choose one of auto"):
        NeuronKeys(DIM, sub_keys=3, heads=4, retrieved=5, key_dim=4, backend="gpu")
