"""Blocks that look rows up in one table, each by its own index."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from peerlm.accounting import model_cost
from peerlm.growth import freeze_grown, grow, observe, set_opening, shrink, to_shells
from peerlm.layers import PEER
from peerlm.model import PeerForCausalLM
from peerlm.optim import RowAdamW, parameter_groups
from peerlm.packs.api import new_pack, unload_pack

pytestmark = pytest.mark.usefixtures("float64")

Build = Callable[..., PeerForCausalLM]
SHELLS = {"num_experts": 16, "heads": 2, "experts_per_head": 3, "key_dim": 8, "pairing": "shells"}


def shared(tiny_model: Build, **settings: Any) -> PeerForCausalLM:
    return tiny_model(**({"ffw_layers": ["peer", "dense", "peer+pkm"], "share_tables": True} | settings))


def draw(*shape: int) -> Tensor:
    return torch.randint(1, 64, shape)


def own_table_each(model: PeerForCausalLM) -> PeerForCausalLM:
    """The same function with a copy of the table in each layer."""
    twin = copy.deepcopy(model)
    for layer in twin.modules():
        if isinstance(layer, PEER):
            layer.own_tables()
    return twin


def peers(model: PeerForCausalLM) -> list[PEER]:
    return [module for module in model.modules() if isinstance(module, PEER)]


def test_a_kind_has_one_table_that_is_counted_and_saved_once(tiny_model: Build, tmp_path: Path) -> None:
    model = shared(tiny_model)
    first, second = peers(model)
    assert first.experts is second.experts
    assert first.product_keys.sub_keys is not second.product_keys.sub_keys
    names = [name for name, _ in model.named_parameters() if name.endswith("rows")]
    assert names == ["model.layers.0.ffw.experts.rows", "model.layers.2.ffw.pkm.values.rows"]
    apart = model_cost(own_table_each(model), 8)
    together = model_cost(model, 8)
    assert apart.total_parameters - together.total_parameters == 16 * 2 * 32
    assert together.active_parameters == apart.active_parameters  # 6 experts of each layer
    assert together.forward_flops_per_token == apart.forward_flops_per_token
    assert together.row_bytes_per_token == apart.row_bytes_per_token
    assert apart.table_bytes - together.table_bytes == 16 * 2 * 32 * 8
    model.eval().save_pretrained(tmp_path)
    assert sum(name.endswith("experts.rows") for name in load_file(tmp_path / "model.safetensors")) == 1
    ids = draw(2, 7)
    for again in (
        AutoModelForCausalLM.from_pretrained(tmp_path),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
    ):
        assert peers(again)[0].experts is peers(again)[1].experts
        assert peers(again)[0].experts is not first.experts
        torch.testing.assert_close(again(ids).logits, model(ids).logits)


@torch.no_grad()
def test_the_table_starts_at_the_scale_of_its_owner(tiny_model: Build) -> None:
    stds = [shared(tiny_model, ffw_layers="peer", ffw_init_scale=[scale, 9.0, 9.0]) for scale in (1.0, 2.0)]
    ratio = (peers(stds[1])[2].experts.up.std() / peers(stds[0])[2].experts.up.std()).item()
    assert ratio == pytest.approx(2.0, rel=0.2)


@pytest.mark.parametrize("optimizer", ["dense", "exact", "lazy", "fused"])
def test_a_step_moves_rows_once_by_the_gradients_of_all_layers(tiny_model: Build, optimizer: str) -> None:
    torch.manual_seed(0)
    model = shared(tiny_model, ffw_layers="peer", peer={**SHELLS, "num_experts": 64, "query_norm": "none"})
    twin, batches = own_table_each(model), [draw(2, 6) for _ in range(3)]
    tables = [layer.experts.rows for layer in peers(twin)]
    groups = parameter_groups(model)
    made: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "dense": lambda: torch.optim.AdamW(groups, lr=1e-2),
        "exact": lambda: RowAdamW(groups, lr=1e-2),
        "lazy": lambda: RowAdamW(groups, lr=1e-2, lazy=True),
        "fused": lambda: RowAdamW(groups, lr=1e-2, fused=True),
    }
    trained = made[optimizer]()
    plain = torch.optim.AdamW(parameter_groups(twin), lr=1e-2)
    for ids in batches:
        model(ids, labels=ids).loss.backward()
        trained.step()
        trained.zero_grad()
        twin(ids, labels=ids).loss.backward()
        total = torch.stack([table.grad for table in tables]).sum(dim=0)
        for table in tables:
            table.grad = total.clone()
        plain.step()
        plain.zero_grad()
        if optimizer == "lazy":
            break  # after the first step it is another optimizer
    moved = model.state_dict()["model.layers.0.ffw.experts.rows"]
    torch.testing.assert_close(moved, tables[0].detach())


def test_growing_opening_renumbering_and_shrinking(tiny_model: Build, tmp_path: Path) -> None:
    peer = {name: value for name, value in SHELLS.items() if name != "pairing"}
    model, ids = shared(tiny_model, ffw_layers=["peer", "dense", "peer"], peer=peer).eval(), draw(2, 9)
    before = model(ids).logits
    to_shells(model)
    torch.testing.assert_close(model(ids).logits, before)
    optimizer = RowAdamW(parameter_groups(model), lr=1e-3)
    grow(model, 36, optimizer=optimizer)
    torch.testing.assert_close(model(ids).logits, before)
    assert all(layer.experts.num_rows == 36 for layer in peers(model))
    assert not peers(model)[0].experts.up[16:].any()
    with freeze_grown(model, ["rows", "keys"]):
        model.train()(ids, labels=ids).loss.backward()
        assert not peers(model)[0].experts.rows.grad.to_dense()[:16].any()
    optimizer.step()
    set_opening(model, 1)
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    before = model(ids).logits
    usage = observe(model, [{"input_ids": ids}]).usage
    remaining = shrink(model, usage=usage)
    first, second = remaining.values()
    assert torch.equal(first, second)
    used = [set(counts.sum(0).nonzero().flatten().tolist()) for counts in usage.values()]
    assert set.union(*used) <= set(first.tolist())
    torch.testing.assert_close(model(ids).logits, before)


def test_growth_of_one_of_the_layers_alone_is_refused(tiny_model: Build) -> None:
    model = shared(tiny_model, peer=SHELLS, ffw_layers=["peer", "dense", "peer"])
    assert grow(own_table_each(model).model.layers[2], 36)
    for block in (0, 2):
        with pytest.raises(ValueError, match="shares its rows with another part of the model"):
            grow(model.model.layers[block], 36)


def test_each_layer_has_packs_of_its_own(tiny_model: Build) -> None:
    model, ids = shared(tiny_model).eval(), draw(2, 9)
    before = model(ids).logits
    assert new_pack(model, "extra", 4, layers=["model.layers.2.ffw.peer"]) == ["model.layers.2.ffw.peer"]
    assert not torch.allclose(model(ids).logits, before)
    unload_pack(model, "extra")
    assert torch.equal(model(ids).logits, before)
