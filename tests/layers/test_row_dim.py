"""Experts narrower than the model: read and written through maps that all experts of a layer share."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peerlm.accounting import model_cost
from peerlm.adapters.pool import AdapterPool
from peerlm.convert import convert
from peerlm.growth import freeze_grown, grow
from peerlm.interpret.edits import edit
from peerlm.interpret.inspected import find_inspected_layers
from peerlm.layers import PEER
from peerlm.layers.output_scale import OUTPUT_POWER
from peerlm.layers.row_map import RowMap
from peerlm.model import PeerConfig, PeerForCausalLM
from peerlm.packs.api import load_pack, new_pack, save_pack, unload_pack
from peerlm.testing import loop_peer

SMALL: dict[str, Any] = {"num_experts": 36, "heads": 2, "experts_per_head": 3, "key_dim": 8}


def narrow(**settings: Any) -> PEER:
    return PEER(16, row_dim=5, **(SMALL | settings)).eval()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("gated", [False, True])
def test_the_layer_is_its_definition(gated: bool) -> None:
    layer, x = narrow(gated=gated), torch.randn(7, 16)
    assert layer.experts.rows.shape == (36, 3 if gated else 2, 5)
    torch.testing.assert_close(layer(x), loop_peer(layer, x))


@pytest.mark.whole_tables("reads gradients of the parameter of a table")
@pytest.mark.usefixtures("float64")
def test_output_and_gradients_are_those_of_wide_rows_of_the_mapped_vectors() -> None:
    layer, wide = narrow(), PEER(16, **SMALL).eval()
    wide.product_keys.load_state_dict(layer.product_keys.state_dict())
    rows = torch.stack([layer.experts.down @ layer.in_proj.weight, layer.experts.up @ layer.out_proj.weight.T], dim=1)
    wide.experts.write(rows.detach())
    inputs = [torch.randn(9, 16).requires_grad_() for _ in range(2)]
    inputs[1].data = inputs[0].data.clone()
    outputs = [layer(inputs[0]), wide(inputs[1])]
    torch.testing.assert_close(*outputs)
    slope = torch.randn(9, 16)
    for y in outputs:
        (y * slope).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    to_u, to_v = wide.experts.rows.grad.unbind(1)
    torch.testing.assert_close(layer.experts.rows.grad[:, 0], to_u @ layer.in_proj.weight.T)
    torch.testing.assert_close(layer.experts.rows.grad[:, 1], to_v @ layer.out_proj.weight)
    torch.testing.assert_close(layer.in_proj.weight.grad, layer.experts.down.T @ to_u)
    torch.testing.assert_close(layer.out_proj.weight.grad, to_v.T @ layer.experts.up)


def test_rows_as_wide_as_the_model_have_no_maps() -> None:
    layers = []
    for settings in ({}, {"row_dim": 16}):
        torch.manual_seed(0)
        layers.append(PEER(16, **SMALL, **settings).eval())
    states = [layer.state_dict() for layer in layers]
    assert states[0].keys() == states[1].keys()
    x = torch.randn(4, 16)
    assert torch.equal(layers[0](x), layers[1](x))


@torch.no_grad()
@pytest.mark.parametrize("row_dim", [8, 64, 256])
def test_the_output_starts_at_the_scale_of_a_dense_layer(row_dim: int) -> None:
    x = torch.randn(512, 128)
    powers = [
        PEER(128, num_experts=64**2, row_dim=row_dim, activation=activation)(x).square().mean()
        for activation in ("gelu", "one_plus")
        for _ in range(4)
    ]
    assert torch.stack(powers).mean().item() == pytest.approx(OUTPUT_POWER, rel=0.15)


def test_rows_and_maps_are_counted() -> None:
    costs = [model_cost(PEER(16, **SMALL, row_dim=row_dim), 1) for row_dim in (16, 4)]
    assert costs[0].total_parameters - costs[1].total_parameters == 36 * 2 * 12 - 2 * 16 * 4
    assert costs[0].active_parameters - costs[1].active_parameters == 6 * 2 * 12 - 2 * 16 * 4
    flops = [cost.forward_flops_per_token for cost in costs]
    assert flops[0] - flops[1] == 2 * 6 * 2 * 12 - 2 * 2 * 16 * 4


@pytest.mark.usefixtures("float64")
def test_growth_keeps_the_function_and_frozen_experts_keep_their_maps() -> None:
    layer, x = narrow(pairing="shells"), torch.randn(5, 16)
    before = layer(x)
    grow(layer, 64)
    torch.testing.assert_close(layer(x), before)
    maps = [layer.in_proj.weight, layer.out_proj.weight]
    with freeze_grown(layer, ["rows"]):
        assert not any(each.requires_grad for each in maps)
    assert all(each.requires_grad for each in maps)


@pytest.mark.usefixtures("float64")
def test_packs_read_and_write_through_the_maps(tmp_path: Path) -> None:
    layer, x = narrow(), torch.randn(5, 16)
    before = layer(x)
    new_pack(layer, "extra", 16)
    pack = layer.packs.by_name()["extra"]
    assert pack.table.rows.shape == (16, 2, 5)
    pack.table.rows.data.normal_()
    changed = layer(x)
    assert not torch.allclose(changed, before)
    save_pack(layer, "extra", tmp_path)
    unload_pack(layer, "extra")
    load_pack(layer, tmp_path)
    torch.testing.assert_close(layer(x), changed)


@pytest.mark.usefixtures("float64")
def test_an_inspection_sees_what_experts_add_to_the_output() -> None:
    model = PeerForCausalLM(
        PeerConfig(
            vocab_size=32,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            ffw_layers="peer",
            peer={**SMALL, "heads": 1, "row_dim": 5},
        )
    ).eval()
    (inspected,) = find_inspected_layers(model)
    layer, seen = inspected.module, {}
    layer.register_forward_hook(lambda module, args, output: seen.update(x=args[0], y=output))
    ids = torch.randint(32, (1, 3))
    model(ids)
    x, y = seen["x"][0], seen["y"][0]
    weights, experts = (each[:, 0] for each in layer.retrieve(x))
    expert = int(experts[-1, 0])
    with edit(model, inspected.name, expert, 0.0):
        model(ids)
    strength = weights[-1, 0] * inspected.activations(x, experts)[-1, 0]
    lost: Tensor = y[-1] - seen["y"][0, -1]
    vector = inspected.vectors(torch.tensor([expert]))[0]
    torch.testing.assert_close(lost, strength * vector)
    assert inspected.norms()[expert].item() == pytest.approx(vector.norm().item())


def test_a_conversion_and_a_model_are_saved_with_their_width(tmp_path: Path) -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = torch.randint(32, (1, 5))
    llama = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=24)).eval()
    plain = llama(ids).logits
    converted = convert(llama, row_dim=4, **SMALL)
    assert torch.equal(converted(ids).logits, plain)
    ours = PeerForCausalLM(PeerConfig(**sizes, peer={**SMALL, "row_dim": 4})).eval()
    for name, model in (("converted", converted), ("ours", ours)):
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        model.save_pretrained(tmp_path / name)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert sum(isinstance(module, RowMap) for module in loaded.modules()) == (4 if name == "converted" else 2)
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.usefixtures("float64")
def test_an_adapter_with_a_width_of_its_own() -> None:
    settings = {**SMALL, "rank": 2, "init_weights": False, "activation": "relu"}
    pool, wide = AdapterPool(16, 12, **settings, row_dim=5), AdapterPool(16, 12, **settings)
    assert (pool.down.rows.shape, pool.up.rows.shape) == ((72, 5), (72, 5))
    wide.product_keys.load_state_dict(pool.product_keys.state_dict())
    wide.down.write((pool.down.rows @ pool.in_proj.weight).detach())
    wide.up.write((pool.up.rows @ pool.out_proj.weight.T).detach())
    x = torch.randn(2, 3, 16)
    torch.testing.assert_close(pool(x), wide(x))
    assert pool.parameters_per_expert == 2 * 10
    assert not AdapterPool(16, 12, **(settings | {"init_weights": True}), row_dim=5)(x).any()


@pytest.mark.parametrize("row_dim", [0, 2.5])
def test_impossible_widths_are_named(row_dim: Any) -> None:
    for build in (lambda: PEER(16, row_dim=row_dim), lambda: AdapterPool(16, 12, **SMALL, row_dim=row_dim)):
        with pytest.raises(ValueError, match=f"row_dim is {row_dim}"):
            build()
