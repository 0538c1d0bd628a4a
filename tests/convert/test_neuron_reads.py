"""Gated neurons found by what they read: exact with all of them, and a sketch that needs few numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from peerlm.accounting import model_cost
from peerlm.convert.neurons.index import fit_index
from peerlm.convert.neurons.layer import NeuronLayer, neuron_layer, neuron_layer_skeleton, pool_tables
from peerlm.convert.neurons.reads import NeuronReads, fit_sketch
from peerlm.convert.neurons.weights import Neurons, neurons_of
from peerlm.layers import DenseFFW

DIM, HIDDEN = 8, 60
READS = {"index": "reads", "sketch": 3}


def gated(*, biases: bool = False, activation: str = "silu", dtype: torch.dtype = torch.float64) -> Neurons:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype)

    return Neurons(
        activation=activation,
        down=normal(HIDDEN, DIM),
        up=normal(HIDDEN, DIM),
        gate=normal(HIDDEN, DIM) * torch.linspace(0.1, 2.0, HIDDEN, dtype=dtype)[:, None],
        down_bias=normal(HIDDEN) if biases else None,
        gate_bias=normal(HIDDEN) if biases else None,
        output_bias=normal(DIM) if biases else None,
    )


def inputs(tokens: int = 2000) -> Tensor:
    return torch.randn(tokens, DIM, dtype=torch.float64) + 0.5


@torch.no_grad()
def error(layer: NeuronLayer, neurons: Neurons, x: Tensor) -> float:
    return ((layer(x) - neurons(x)).norm() / neurons(x).norm()).item()


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("biases", [False, True])
def test_all_neurons_are_the_dense_layer_and_some_are_their_sum(biases: bool, activation: str) -> None:
    neurons, x = gated(biases=biases, activation=activation), inputs(10)
    layer = neuron_layer(neurons, READS | {"share": 1.0})
    torch.testing.assert_close(layer(x.view(2, 5, DIM)).detach(), neurons(x).view(2, 5, DIM))
    for part in ("down", "up", "gate", "down_bias", "gate_bias"):
        torch.testing.assert_close(getattr(layer.neurons(), part), getattr(neurons, part))
    layer.share = 0.3
    retrieved = layer.retrieved_mask(x)
    assert retrieved.sum(dim=1).tolist() == [18] * 10
    bias = 0 if neurons.output_bias is None else neurons.output_bias
    torch.testing.assert_close(layer(x).detach(), (neurons.activations(x) * retrieved) @ neurons.up + bias)


def test_a_full_sketch_finds_the_most_important_neurons() -> None:
    neurons, x = gated(biases=True), inputs()
    layer = neuron_layer(neurons, {"index": "reads", "sketch": 64, "share": 0.25})
    index = layer.index
    assert isinstance(index, NeuronReads)
    assert len(index.sketch_in) == DIM  # a map of DIM features has no higher rank
    assert fit_index(layer, x).misfit == pytest.approx(0.0, abs=1e-9)
    torch.testing.assert_close(index.missed, torch.zeros(HIDDEN, dtype=torch.float64))
    best = torch.zeros(len(x), HIDDEN).scatter_(1, neurons.importance(x).topk(15, dim=1).indices, 1.0).bool()
    assert torch.equal(layer.retrieved_mask(x), best)


def test_the_sketch_is_the_nearest_map_of_its_rank_and_keeps_the_mean_square_of_gates() -> None:
    neurons, x = gated(), inputs()
    layer = neuron_layer(neurons, READS)
    index = layer.index
    assert isinstance(index, NeuronReads)
    missed = fit_sketch(index, neurons, x, 300)
    powers = F.silu(F.linear(x, neurons.gate)).square().mean(dim=0)
    short = index.missed > 0  # a sketch may also have more than the gate itself, which is left as it is
    assert short.sum() > 50
    torch.testing.assert_close(index.gate_powers(x).mean(dim=0)[short], powers[short])
    # The best approximation of the weighted gates on these inputs, by the singular values of what they are.
    cost = F.linear(x, neurons.down).square().sum(dim=0).sqrt() * neurons.up.norm(dim=1)
    weighted = F.linear(x, neurons.gate) * cost
    values = torch.linalg.svdvals(weighted)
    assert missed == pytest.approx((values[3:].square().sum() / values.square().sum()).item(), rel=1e-3)
    difference = weighted - x @ index.sketch_in.T @ index.sketch_out.T * cost
    assert difference.square().sum().item() == pytest.approx(values[3:].square().sum().item(), rel=1e-3)


def test_more_of_a_sketch_and_more_neurons_are_nearer() -> None:
    neurons, x, unseen = gated(biases=True), inputs(), inputs()
    errors = []
    for sketch in (0, 4, 8):
        layer = neuron_layer(neurons, {"index": "reads", "sketch": sketch, "share": 0.3})
        fit_index(layer, x)
        errors.append(error(layer, neurons, unseen))
    assert errors == sorted(errors, reverse=True)
    layer.share = 0.6
    layer.center(x)
    assert error(layer, neurons, unseen) < 0.7 * errors[-1]


def test_neurons_that_move_take_their_reads_and_sketch_along() -> None:
    neurons, x = gated(biases=True), inputs()
    layer = neuron_layer(neurons, READS | {"share": 0.3})
    fit_index(layer, x)
    before, order = layer(x).detach(), torch.randperm(HIDDEN)
    mask = layer.retrieved_mask(x)
    layer.place(order)
    torch.testing.assert_close(layer(x).detach(), before)
    assert torch.equal(layer.retrieved_mask(x), mask[:, order])


def test_saved_and_rebuilt_from_sizes_alone() -> None:
    neurons, x = gated(biases=True), inputs(200)
    layer = neuron_layer(neurons, READS | {"share": 0.4})
    fit_index(layer, x)
    with torch.device("meta"):
        rebuilt = neuron_layer_skeleton(DIM, HIDDEN, "silu", True, True, READS | {"share": 0.4})
    rebuilt.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(rebuilt(x), layer(x))


def test_pooled_layers_compute_the_same() -> None:
    x = inputs(200)
    layers = [neuron_layer(gated(), READS | {"share": 0.4}) for _ in range(2)]
    for layer in layers:
        fit_index(layer, x)
    before = [layer(x) for layer in layers]
    pool_tables(layers)
    for layer, expected in zip(layers, before, strict=True):
        torch.testing.assert_close(layer(x), expected)


def test_reads_rows_and_bias_have_gradients() -> None:
    layer = neuron_layer(gated(biases=True), READS | {"share": 0.5})
    layer(inputs(7)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_cost_is_what_torch_counts() -> None:
    x = torch.randn(8, 32)
    layer = NeuronLayer(32, 64, share=0.25, gated=True, index="reads", sketch=4, backend="reference")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    assert model_cost(layer, 1).forward_flops_per_token == counter.get_total_flops() / 8
    assert counter.get_total_flops() / 8 == 2 * (32 * 64 + 4 * (32 + 64) + 2 * 32 * 16)


def test_random_layers_have_the_output_scale_of_dense_ones() -> None:
    torch.manual_seed(0)
    layer, x = NeuronLayer(64, 256, share=1.0, gated=True, activation="silu", index="reads"), torch.randn(500, 64)
    assert layer(x).std().item() == pytest.approx(DenseFFW(64)(x).std().item(), rel=0.15)


def test_a_half_precision_layer_can_be_fitted() -> None:
    exact, x = DenseFFW(DIM, hidden=HIDDEN, activation="silu", gated=True).bfloat16(), inputs().bfloat16()
    layer = neuron_layer(neurons_of(exact), {"index": "reads", "sketch": 8, "share": 0.5})
    fit = fit_index(layer, x)
    assert layer.index.missed.dtype == torch.bfloat16
    assert fit.error < 0.3


def test_inputs_that_are_not_finite_are_refused_and_zeros_are_not() -> None:
    x, neurons = inputs(50), gated()
    fit = fit_index(neuron_layer(neurons, READS), torch.zeros_like(x))
    assert fit.error == 0
    x[3, 2] = float("nan")
    with pytest.raises(ValueError, match="inputs hold NaN or infinities"):
        fit_index(neuron_layer(neurons, READS), x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"index": "graph", "gated": True}, "index is 'graph', but there is none such; choose keys or reads"),
        ({"index": "reads"}, "index is 'reads', but it takes gated neurons, and these have no gate; choose keys"),
        ({"index": "reads", "gated": True, "sketch": -1}, "sketch is -1; it must be at least 1"),
    ],
    ids=str,
)
def test_impossible_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeuronLayer(DIM, HIDDEN, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "index", "other"), [("heads", "reads", "keys"), ("sketch", "keys", "reads")])
def test_a_setting_of_the_other_index_is_refused(name: str, index: str, other: str) -> None:
    message = f"{name} is a setting of index='{other}', and the index is '{index}'; leave it out"
    with pytest.raises(ValueError, match=message):
        neuron_layer(gated(), {name: 4} | ({"index": index} if index == "reads" else {}))
