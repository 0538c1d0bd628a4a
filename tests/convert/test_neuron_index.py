"""A learned index retrieves what matters, changes nothing else, and is a function of its seed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peerlm.convert.neurons.index import IndexFit, _load_index, fit_index
from peerlm.convert.neurons.keys import NeuronKeys
from peerlm.convert.neurons.layer import NeuronLayer, neuron_layer, pool_tables
from peerlm.convert.neurons.weights import Neurons, neurons_of
from peerlm.layers import DenseFFW

DIM, HIDDEN = 8, 60
SETTINGS = {"heads": 4, "key_dim": 8, "share": 0.2}


def dense() -> DenseFFW:
    """Few neurons fire at a time: they read with vectors that stand far from most inputs."""
    layer = DenseFFW(DIM, hidden=HIDDEN, activation="relu")
    with torch.no_grad():
        layer.down_proj.weight.sub_(0.3)
    return layer


def inputs(tokens: int = 3000) -> Tensor:
    return torch.randn(tokens, DIM) + 0.5


def fit(layer: NeuronLayer, x: Tensor, **options: int) -> IndexFit:
    return fit_index(layer, x, **({"steps": 40, "batch_size": 256, "sweeps": 60} | options))


@torch.no_grad()
def error(layer: NeuronLayer, exact: DenseFFW, x: Tensor) -> float:
    return ((layer(x) - exact(x)).norm() / exact(x).norm()).item()


def test_a_learned_index_beats_linear_predictors_which_beat_chance() -> None:
    exact, x, unseen = dense(), inputs(), inputs()
    random, linear, learned = (neuron_layer(neurons_of(exact), SETTINGS) for _ in range(3))
    random.center(x)
    before = fit(linear, x, steps=0)
    after = fit(learned, x, steps=200)
    errors = [error(layer, exact, unseen) for layer in (random, linear, learned)]
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < 0.97 * errors[1]
    assert after.last_loss < 0.9 * after.first_loss
    assert 0 < after.misfit == before.misfit < 1


@pytest.mark.usefixtures("float64")
def test_an_index_with_room_begins_as_the_linear_predictors() -> None:
    index = NeuronKeys(DIM, sub_keys=3, heads=2, retrieved=1, key_dim=6)
    rows, columns = torch.randn(2, 3, DIM + 1), torch.randn(2, 3, DIM + 1)
    _load_index(index, rows, columns)
    x = torch.randn(5, DIM)
    sums = (rows[:, :, None] + columns[:, None]).flatten(0, 2)
    torch.testing.assert_close(index.scores(x).detach(), F.pad(x, (0, 1), value=1.0) @ sums.T)


@pytest.mark.usefixtures("float64")
def test_more_neurons_are_nearer_and_all_are_exact() -> None:
    exact, x = dense(), inputs()
    layer = neuron_layer(neurons_of(exact), SETTINGS)
    fit(layer, x)
    errors = []
    for share in (0.05, 0.2, 0.5, 1.0):
        layer.share = share
        layer.center(x)
        errors.append(error(layer, exact, x))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-7


@pytest.mark.usefixtures("float64")
def test_mean_rest_is_measured() -> None:
    exact, x = dense(), inputs()
    layer = neuron_layer(neurons_of(exact), SETTINGS)
    fit(layer, x)
    torch.testing.assert_close(layer(x).mean(dim=0), exact(x).mean(dim=0))


def test_it_is_a_function_of_the_seed_and_of_nothing_else() -> None:
    exact, x = dense(), inputs()
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(100 * len(states))
        layer = neuron_layer(neurons_of(exact), SETTINGS)
        fit(layer, x, seed=seed)
        states.append(layer.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["index.sub_keys"], states[2]["index.sub_keys"])


def test_frozen_weights_stay_frozen_and_no_gradient_is_left() -> None:
    layer = neuron_layer(neurons_of(dense()), SETTINGS).requires_grad_(False)
    fit(layer, inputs())
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_a_pooled_layer_is_fitted_within_its_own_rows() -> None:
    exact, x = dense(), inputs()
    layers = [neuron_layer(neurons_of(layer), SETTINGS) for layer in (dense(), exact)]
    pool_tables(layers)
    alone, others = neuron_layer(neurons_of(exact), SETTINGS), layers[0].rows().clone()
    for layer in (layers[1], alone):
        fit(layer, x)
    assert torch.equal(layers[0].rows(), others)
    assert torch.equal(layers[1](x), alone(x))


def test_a_half_precision_layer_can_be_fitted() -> None:
    exact, x = dense(), inputs()
    layer = neuron_layer(neurons_of(exact.bfloat16()), SETTINGS)
    random = copy.deepcopy(layer)
    random.center(x.bfloat16())
    fit(layer, x.bfloat16())
    assert layer.index.sub_keys.dtype == torch.bfloat16
    assert error(layer, exact, x.bfloat16()) < 0.7 * error(random, exact, x.bfloat16())


def test_gated_neurons_with_biases() -> None:
    neurons = Neurons(
        activation="silu",
        down=torch.randn(HIDDEN, DIM),
        up=torch.randn(HIDDEN, DIM),
        gate=torch.randn(HIDDEN, DIM),
        down_bias=torch.randn(HIDDEN),
        gate_bias=torch.randn(HIDDEN) - 1,
        output_bias=torch.randn(DIM),
    )
    x = inputs()
    layer, random = neuron_layer(neurons, SETTINGS), neuron_layer(neurons, SETTINGS)
    fit(layer, x, steps=100)
    random.center(x)
    errors = [((each(x) - neurons(x)).norm() / neurons(x).norm()).item() for each in (layer, random)]
    assert errors[0] < 0.8 * errors[1]


def test_progress_is_reported() -> None:
    calls: list[tuple[int, int]] = []
    layer = neuron_layer(neurons_of(dense()), SETTINGS)
    fit_index(layer, inputs(50), steps=3, batch_size=8, sweeps=0, report=lambda *call: calls.append(call))
    assert calls == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite(value: float) -> None:
    x = inputs(50)
    x[3, 2] = value
    with pytest.raises(ValueError, match="inputs hold NaN or infinities"):
        fit(neuron_layer(neurons_of(dense()), SETTINGS), x)


def test_a_loss_that_is_not_finite() -> None:
    layer = neuron_layer(neurons_of(dense()), SETTINGS)
    with pytest.raises(
        FloatingPointError, match=r"loss of the index is (nan|inf) at step \d+; take a learning_rate below"
    ):
        fit_index(layer, inputs(50), steps=40, batch_size=8, sweeps=0, learning_rate=1e30)


@pytest.mark.parametrize("x", [torch.zeros(5, DIM + 1), torch.zeros(1, DIM), torch.zeros(2, 3, DIM)], ids=str)
def test_inputs_of_another_shape(x: Tensor) -> None:
    with pytest.raises(
        ValueError, match=rf"inputs have shape .*; pass what the layer reads, \(2 tokens or more, {DIM}\)"
    ):
        fit(neuron_layer(neurons_of(dense()), SETTINGS), x)


def test_impossible_sizes() -> None:
    layer = neuron_layer(neurons_of(dense()), SETTINGS)
    with pytest.raises(ValueError, match="batch_size is 0; it must be at least 1"):
        fit(layer, inputs(50), batch_size=0)
    with pytest.raises(ValueError, match="steps is -1 and sweeps is 60; they must be 0 or more"):
        fit(layer, inputs(50), steps=-1)
