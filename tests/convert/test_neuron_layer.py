"""Retrieved neurons are the dense layer when all are retrieved, and its chosen part otherwise."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from peerlm.accounting import model_cost
from peerlm.convert.neurons.layer import NeuronLayer, neuron_layer, neuron_layer_skeleton, pool_tables
from peerlm.convert.neurons.weights import Neurons, neurons_of
from peerlm.layers import DenseFFW
from peerlm.ops.functions import ACTIVATIONS
from peerlm.optim import parameter_groups
from peerlm.testing import assert_within_budget, gradient_of
from peerlm.usage import record_usage

DIM, HIDDEN = 6, 22  # 22 neurons do not fill 2 grids of 4 x 4
SETTINGS = {"heads": 2, "key_dim": 4}


def some_neurons(
    *, gated: bool = False, biased: bool = False, activation: str = "gelu", hidden: int = HIDDEN
) -> Neurons:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    return Neurons(
        activation=activation,
        down=normal(hidden, DIM),
        up=normal(hidden, DIM),
        gate=normal(hidden, DIM) if gated else None,
        down_bias=normal(hidden) if biased else None,
        gate_bias=normal(hidden) if biased and gated else None,
        output_bias=normal(DIM) if biased else None,
    )


def cast(neurons: Neurons, dtype: torch.dtype) -> Neurons:
    return Neurons(
        **{name: part.to(dtype) if isinstance(part, Tensor) else part for name, part in vars(neurons).items()}
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_all_neurons_are_the_dense_layer(biased: bool, gated: bool, activation: str) -> None:
    neurons, x = some_neurons(gated=gated, biased=biased, activation=activation), torch.randn(2, 5, DIM).double()
    layer = neuron_layer(neurons, {**SETTINGS, "share": 1.0})
    assert layer.num_places == 32
    exact = neurons(x.view(10, DIM)).view(2, 5, DIM)
    torch.testing.assert_close(layer(x).detach(), exact)
    single = cast(neurons, torch.float32)
    plain = single(x.float().view(10, DIM)).view(2, 5, DIM)
    assert_within_budget(neuron_layer(single, {**SETTINGS, "share": 1.0})(x.float()).detach(), plain, exact)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
def test_a_share_is_the_sum_of_the_neurons_retrieved(share: float) -> None:
    neurons, x = some_neurons(gated=True, biased=True), torch.randn(7, DIM).double()
    layer = neuron_layer(neurons, {**SETTINGS, "share": share})
    _, ids = layer.index(x)
    assert ids.shape[-1] == round(share * HIDDEN)
    chosen = torch.zeros(7, layer.num_places).double().scatter_(1, ids[:, 0], 1.0)[:, :HIDDEN]
    expected = (chosen * neurons.activations(x)) @ neurons.up + neurons.output_bias
    torch.testing.assert_close(layer(x).detach(), expected)


def test_places_are_moved_without_a_change_of_the_whole() -> None:
    neurons, x = some_neurons(biased=True), torch.randn(7, DIM).double()
    layer = neuron_layer(neurons, {**SETTINGS, "share": 1.0})
    order = torch.randperm(layer.num_places)
    before = layer.rows().clone()
    layer.place(order)
    torch.testing.assert_close(layer.rows(), before[order])
    torch.testing.assert_close(layer(x).detach(), neurons(x))
    torch.testing.assert_close(layer.neurons()(x), neurons(x))


def test_center_makes_the_mean_right() -> None:
    neurons, x = some_neurons(biased=True), torch.randn(50, DIM).double()
    layer = neuron_layer(neurons, {**SETTINGS, "share": 0.3})
    assert (layer(x) - neurons(x)).mean(dim=0).abs().max() > 0.01
    layer.center(x, batch_size=7)
    torch.testing.assert_close(layer(x).mean(dim=0).detach(), neurons(x).mean(dim=0))
    layer.share = 1.0
    layer.center(x)
    torch.testing.assert_close(layer.mean_rest, torch.zeros(DIM).double())


def test_index_neurons_and_bias_have_gradients() -> None:
    layer = neuron_layer(some_neurons(gated=True, biased=True), {**SETTINGS, "share": 0.5})
    layer(torch.randn(7, DIM).double()).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    groups = {group["name"]: group["params"] for group in parameter_groups(layer)}
    assert set(groups["table"]) == set(layer.table.row_parameters())
    assert [p is layer.index.sub_keys for p in groups["keys"]] == [True]


def test_saved_and_rebuilt_from_sizes_alone() -> None:
    neurons, x = some_neurons(gated=True, biased=True, activation="silu"), torch.randn(7, DIM).double()
    settings = {**SETTINGS, "share": 0.4}
    layer = neuron_layer(neurons, settings)
    layer.center(x)
    with torch.device("meta"):
        rebuilt = neuron_layer_skeleton(DIM, HIDDEN, "silu", True, True, settings)
    assert all(tensor.is_meta for tensor in (*rebuilt.parameters(), *rebuilt.buffers()))
    rebuilt.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(rebuilt(x), layer(x))


def test_random_layers_are_as_loud_as_dense_ones() -> None:
    torch.manual_seed(0)
    layer, x = NeuronLayer(64, 256, share=0.25), torch.randn(500, 64)
    assert layer(x).std().item() == pytest.approx(DenseFFW(64)(x).std().item(), rel=0.15)
    layer.reset_parameters(output_scale=0.5)
    assert layer(x).std().item() == pytest.approx(0.5 * DenseFFW(64)(x).std().item(), rel=0.15)


def pooled_pair(**kinds: Any) -> tuple[nn.ModuleList, list[Neurons]]:
    neurons = [some_neurons(**kinds), some_neurons(**kinds, hidden=9)]
    layers = nn.ModuleList(neuron_layer(part, {**SETTINGS, "share": 0.5}) for part in neurons)
    return layers, neurons


@pytest.mark.parametrize("biased", [False, True])
def test_pooled_layers_share_one_table_and_compute_the_same(biased: bool) -> None:
    layers, _ = pooled_pair(biased=biased)
    x = torch.randn(7, DIM).double()
    separate = copy.deepcopy(layers)
    pool_tables(list(layers))
    assert [name for name in layers.state_dict() if name.endswith("experts.rows")] == ["0.experts.rows"]
    assert layers[1].table is layers[0].experts
    assert sum(p.numel() for p in layers.parameters()) == sum(p.numel() for p in separate.parameters())
    assert model_cost(layers, 1) == model_cost(separate, 1)
    for layer, alone in zip(layers, separate, strict=True):
        torch.testing.assert_close(layer(x), alone(x))
        torch.testing.assert_close(layer.rows(), alone.rows())
    order = torch.randperm(layers[1].num_places)
    layers[1].place(order)
    torch.testing.assert_close(layers[0].rows(), separate[0].rows())
    torch.testing.assert_close(layers[1].rows(), separate[1].rows()[order])
    other = copy.deepcopy(layers)
    assert other[1].table is other[0].experts
    layers[1](x).sum().backward()
    gradient = gradient_of(layers[0].experts)
    assert gradient[: layers[0].num_places].abs().sum() == 0
    assert gradient[layers[0].num_places :].abs().sum() > 0


def test_pooled_skeletons_load_a_pooled_state(tmp_path: Path) -> None:
    layers, neurons = pooled_pair()
    pool_tables(list(layers))
    x = torch.randn(7, DIM).double()
    with torch.device("meta"):
        rebuilt = nn.ModuleList(
            neuron_layer_skeleton(DIM, len(part.down), "gelu", False, False, {**SETTINGS, "share": 0.5})
            for part in neurons
        )
    pool_tables(list(rebuilt))
    save_file(layers.state_dict(), tmp_path / "model.safetensors")  # refuses tensors that share memory
    rebuilt.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
    assert all(torch.equal(saved, rebuilt.state_dict()[name]) for name, saved in layers.state_dict().items())
    for layer, loaded in zip(layers, rebuilt, strict=True):
        torch.testing.assert_close(layer(x), loaded(x))


@pytest.mark.parametrize(("biases", "width"), [(False, 32), (True, 40)])
def test_cost_is_what_torch_counts(biases: bool, width: int) -> None:
    x = torch.randn(8, 32)
    layer = NeuronLayer(32, 64, share=0.25, heads=4, key_dim=8, gated=True, biases=biases, backend="reference")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    cost = model_cost(layer, 1)
    assert cost.forward_flops_per_token == counter.get_total_flops() / 8
    assert cost.total_parameters - cost.active_parameters == 3 * width * 48
    layer.share = 1.0
    assert model_cost(layer, 1).active_parameters == cost.total_parameters


def test_use_of_neurons_is_recorded() -> None:
    layer = neuron_layer(some_neurons(), {**SETTINGS, "share": 1.0})
    with record_usage(layer) as usage:
        layer(torch.randn(7, DIM).double())
        layer(torch.randn(3, 2, DIM).double(), mask=torch.eye(3, 2).bool())
    assert [(name, use.share) for name, use in usage.items()] == [("index", 1.0)]
    assert usage["index"].retrievals_N.tolist() == [7 + 2] * layer.num_places


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 0.0}, "share is 0.0; .* 0 < share <= 1"),
        ({"share": 1.5}, "share is 1.5; .* 0 < share <= 1"),
        ({"heds": 2}, "no setting 'heds'; did you mean 'heads'"),
        ({"zzz": 2}, "no setting 'zzz'; choose from share, heads"),
        ({"heads": 2.5}, "heads is 2.5; it must be a whole number"),
    ],
    ids=str,
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        neuron_layer(some_neurons(), settings)


@pytest.mark.parametrize("kinds", [{"hidden": 9}, {"gated": True}, {"activation": "relu"}, {"biased": True}], ids=str)
def test_neurons_of_another_kind_are_refused(kinds: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"neurons to load have neurons .*; this layer has neurons 22, .*: build it like"
    ):
        neuron_layer(some_neurons(), SETTINGS).load_neurons(some_neurons(**kinds))


def test_what_cannot_be_pooled() -> None:
    one, two = pooled_pair()[0]
    with pytest.raises(ValueError, match="1 layers to pool; give at least two"):
        pool_tables([one])
    with pytest.raises(ValueError, match="differ in activation, gate, width"):
        pool_tables([one, neuron_layer(some_neurons(gated=True), SETTINGS)])
    pool_tables([one, two])
    with pytest.raises(ValueError, match="share a table already"):
        pool_tables([one, two])
    with pytest.raises(ValueError, match="share a table already"):
        pool_tables([neuron_layer(some_neurons(), SETTINGS), two])


def test_neurons_of_our_dense_layer() -> None:
    dense, x = DenseFFW(DIM, hidden=HIDDEN, activation="silu", gated=True).double(), torch.randn(7, DIM).double()
    layer = neuron_layer(neurons_of(dense), {**SETTINGS, "share": 1.0})
    torch.testing.assert_close(layer(x), dense(x))
