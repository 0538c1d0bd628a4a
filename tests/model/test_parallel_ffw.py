"""Models whose blocks have layers beside each other, and output scales for each block or kind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from peerlm.growth import grow, observe, set_opening, shrink
from peerlm.interpret.inspected import find_inspected_layers
from peerlm.layers import PEER, DenseFFW, ParallelFFW
from peerlm.model import PeerConfig, PeerForCausalLM
from peerlm.model.configuration_peer import kinds_of_blocks
from peerlm.optim import parameter_groups
from peerlm.packs.api import load_pack, new_pack, save_pack, unload_pack
from peerlm.usage import record_usage

pytestmark = pytest.mark.usefixtures("float64")

Build = Callable[..., PeerForCausalLM]


def warmed_up(model: PeerForCausalLM) -> PeerForCausalLM:
    with torch.no_grad():
        model.train()(torch.randint(1, 64, (4, 16)))
    return model.eval()


def test_each_part_has_the_settings_of_its_kind(tiny_model: Build) -> None:
    model = tiny_model(ffw_layers=["dense", "peer+dense", "pkm+swiglu"], parallel_intermediate_size=12)
    alone, beside, gated = (block.ffw for block in model.model.layers)
    assert alone.up_proj.in_features == 4 * 32
    assert isinstance(beside, ParallelFFW)
    assert isinstance(beside.peer, PEER)
    assert beside.peer.experts.num_experts == 16
    assert beside.dense.up_proj.in_features == 12
    assert gated.swiglu.up_proj.in_features == 8
    assert tiny_model(ffw_layers="peer+dense").model.layers[0].ffw.dense.up_proj.in_features == 4 * 32


def test_the_inner_blocks_can_have_layers_beside_each_other() -> None:
    assert kinds_of_blocks("peer+dense:inner", 4) == ["dense", "peer+dense", "peer+dense", "dense"]


@pytest.mark.parametrize("kinds", ["peer+dense", "token_choice+pkm"])
def test_training_saving_loading_and_generating(tiny_model: Build, tmp_path: Path, kinds: str) -> None:
    model, ids = tiny_model(ffw_layers=kinds), torch.randint(1, 64, (2, 9))
    out = model(ids, labels=ids)
    assert (out.aux_loss is None) == ("token_choice" not in kinds)
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    named = {group["name"] for group in parameter_groups(model)}
    assert named == {"matrix", "vector", "table", "keys"}
    model = warmed_up(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(ids, **settings), model.generate(ids, use_cache=False, **settings))


def test_usage_growth_packs_and_inspection_find_a_part(tiny_model: Build, tmp_path: Path) -> None:
    settings = {"num_experts": 16, "heads": 2, "experts_per_head": 3, "key_dim": 8, "pairing": "shells"}
    model = warmed_up(tiny_model(ffw_layers=["dense", "peer+dense", "dense"], peer=settings))
    ids = torch.randint(1, 64, (2, 9))
    before = model(ids).logits
    with record_usage(model) as usage:
        model(ids)
    assert list(usage) == ["model.layers.1.ffw.peer.product_keys"]
    assert [layer.number for layer in find_inspected_layers(model)] == [1]
    paths = new_pack(model, "extra", 4)
    assert paths == ["model.layers.1.ffw.peer"]
    save_pack(model, "extra", tmp_path / "pack")
    unload_pack(model, "extra")
    load_pack(model, tmp_path / "pack")
    unload_pack(model, "extra")
    grow(model, 36)
    torch.testing.assert_close(model(ids).logits, before)
    set_opening(model, 1)
    model.save_pretrained(tmp_path / "model")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.peer["num_experts"] == 36
    shrink(model, 25, usage=observe(model, [{"input_ids": ids}]).usage)
    assert model.model.layers[1].ffw.peer.experts.num_experts == 25


def written_std(block: Any) -> dict[str, float]:
    outputs: dict[type, Callable[[Any], Tensor]] = {
        DenseFFW: lambda layer: layer.up_proj.weight,
        PEER: lambda layer: layer.experts.up,
    }
    return {
        type(part).__name__: outputs[type(part)](part).std().item()
        for part in block.ffw.modules()
        if type(part) in outputs
    }


def test_output_scales_of_blocks_and_of_kinds(tiny_model: Build) -> None:
    kinds = ["dense", "peer", "peer+dense"]
    one = [written_std(block) for block in tiny_model(ffw_layers=kinds, ffw_init_scale=1.0).model.layers]
    assert one[2]["PEER"] == pytest.approx(one[1]["PEER"] * 2**-0.5, rel=0.2)
    assert one[2]["DenseFFW"] == pytest.approx(one[0]["DenseFFW"] * 2**-0.5, rel=0.2)
    for given, expected in (
        ([2.0, 1.0, 4.0], [{"DenseFFW": 2.0}, {"PEER": 1.0}, {"DenseFFW": 4.0, "PEER": 4.0}]),
        ({"dense": 3, "peer": 0.5}, [{"DenseFFW": 3.0}, {"PEER": 0.5}, {"DenseFFW": 3.0, "PEER": 0.5}]),
    ):
        blocks = tiny_model(ffw_layers=kinds, ffw_init_scale=given).model.layers
        for block, base, factors in zip(blocks, one, expected, strict=True):
            found = written_std(block)
            assert found.keys() == factors.keys()
            for name, std in found.items():
                assert std == pytest.approx(factors[name] * base[name], rel=0.2)


@pytest.mark.parametrize("scale", [2, [1, 2.5, 3], {"dense": 3.0, "peer": 1}])
def test_configurations_keep_their_scales(tmp_path: Path, scale: Any) -> None:
    blocks = ["dense", "peer+dense", "dense"]
    config = PeerConfig(num_hidden_layers=3, ffw_layers=blocks, ffw_init_scale=scale, parallel_intermediate_size=5)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert (loaded.ffw_init_scale, loaded.parallel_intermediate_size) == (scale, 5)
