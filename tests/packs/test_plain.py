"""Packs of models without experts: bits without them, several at once, by sequence, their files, their gates."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peerlm.errors import UserError
from peerlm.packs.api import choose_packs, load_pack, loaded_packs, new_pack, pack_parameters, save_pack, unload_pack
from peerlm.packs.base_hash import base_hash
from peerlm.packs.fit import fit_gates
from peerlm.packs.gate import Gate
from peerlm.packs.plain import holders

from ..models import build

FAMILIES = ["llama", "gpt_neox", "qwen3", "opt", "gpt2"]
IDS = torch.arange(1, 28).view(3, 9)


def logits(model: nn.Module, ids: Tensor = IDS, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **options).logits  # type: ignore[no-any-return]


def add_pack(model: nn.Module, name: str, **options: Any) -> None:
    """A pack that says something everywhere."""
    new_pack(model, name, 16, seed=len(name), **options)
    generator = torch.Generator().manual_seed(len(name))
    for parameter in pack_parameters(model, name):
        nn.init.normal_(parameter, generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
def test_unloading_gives_back_every_bit_and_every_module(family: str, tmp_path: Path) -> None:
    model = build(family)
    before, weights = logits(model), copy.deepcopy(model.state_dict())
    modules, digest = [name for name, _ in model.named_modules()], base_hash(model)
    for name in ("law", "medicine"):
        add_pack(model, name)
        save_pack(model, name, tmp_path / name)
    both = logits(model)
    assert not torch.allclose(both, before, atol=1e-2)
    assert base_hash(model) == digest
    assert model.state_dict().keys() == weights.keys()
    assert model.load_state_dict(weights) == ([], [])
    unload_pack(model, "law")
    only = logits(model)
    unload_pack(model, "medicine")
    assert torch.equal(logits(model), before)
    assert [name for name, _ in model.named_modules()] == modules
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    load_pack(model, tmp_path / "medicine")
    assert torch.equal(logits(model), only)
    load_pack(model, tmp_path / "law")
    assert torch.equal(logits(model), both)
    assert loaded_packs(model) == ["law", "medicine"]


def test_a_new_pack_changes_nothing_and_trains_alone() -> None:
    model = build("llama").requires_grad_(False)
    before = logits(model)
    assert new_pack(model, "law", 16) == [f"model.layers.{block}.mlp" for block in range(3)]
    assert torch.equal(logits(model), before)
    model(IDS, labels=IDS).loss.backward()
    assert {parameter for parameter in model.parameters() if parameter.requires_grad} == set(
        pack_parameters(model, "law")
    )
    rows = holders(model)["model.layers.2.mlp"].by_name()["law"].table.rows
    assert rows.grad is not None
    assert rows.grad[:, 1].abs().sum() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_each_sequence_has_its_own_packs(family: str, tmp_path: Path) -> None:
    model = build(family)
    before = logits(model)
    alone = {}
    for name in ("law", "medicine"):
        add_pack(model, name)
        alone[name] = logits(model)
        save_pack(model, name, tmp_path / name)
        unload_pack(model, name)
    for name in ("law", "medicine"):
        load_pack(model, tmp_path / name)
    with choose_packs(model, [["law"], [], ["medicine"]]):
        found = logits(model)
        with pytest.raises(ValueError, match="names the pack 'law' now"):
            unload_pack(model, "law")
    assert torch.equal(found[1], before[1])
    torch.testing.assert_close(found[0], alone["law"][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[2], alone["medicine"][2], rtol=1e-4, atol=1e-4)
    with choose_packs(model, [[]]):
        assert torch.equal(logits(model), before)
    for lists in (2, 9):  # some families hand their layers all 27 tokens in one row
        with choose_packs(model, [[]] * lists), pytest.raises(ValueError, match=f"{lists} lists, but the batch has 3"):
            logits(model)


def test_generation_with_a_cache_is_that_of_whole_passes() -> None:
    model = build("llama")
    add_pack(model, "law")
    long = model.generate(IDS[:1], max_new_tokens=6, min_new_tokens=6, do_sample=False)
    for length in range(9, 15):
        assert long[0, length] == logits(model, long[:, :length])[0, -1].argmax()


def test_another_model_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    model = build("llama")
    add_pack(model, "law")
    save_pack(model, "law", tmp_path / "law")
    other = build("llama")
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1  # type: ignore[union-attr,index,operator]
    before = logits(other)
    with pytest.raises(UserError, match=r"was made for the model [0-9a-f]{12}, a LlamaForCausalLM; this one is"):
        load_pack(other, tmp_path / "law")
    assert torch.equal(logits(other), before)
    with pytest.raises(UserError, match="was made for the model"):
        load_pack(build("qwen3"), tmp_path / "law")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"heads": 3}}, "cannot be put beside"),
        ({"settings": {"cleverness": 3}}, "cannot be put beside"),
        ({"layers": {"model.layers.9.mlp": 16}}, "cannot be put beside"),
        ({"layers": {"model.layers.2.mlp": 10**12}}, "cannot be put beside"),
        ({"settings": "many"}, "settings is 'many'"),
    ],
)
def test_a_manifest_that_does_not_fit_its_tensors_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = build("llama")
    add_pack(model, "law")
    save_pack(model, "law", tmp_path / "law")
    unload_pack(model, "law")
    path = tmp_path / "law" / "manifest.json"
    values = json.loads(path.read_text())
    assert values["version"] == 2
    path.write_text(json.dumps(values | change))
    before = logits(model)
    with pytest.raises(UserError, match=message):
        load_pack(model, tmp_path / "law")
    assert loaded_packs(model) == []
    assert torch.equal(logits(model), before)


def test_impossible_packs_are_refused() -> None:
    model = build("llama")
    for options, message in (
        ({"layers": ["model.layers.9.mlp"]}, "the feed-forward layers are 'model.layers.0.mlp'"),
        ({"layers": []}, "give a list of paths of feed-forward layers"),
        ({"keys": "crowded"}, "has no PEER layer whose sub-keys"),
        ({"settings": {"cleverness": 3}}, "none of PEER's"),
        ({"settings": {"experts_per_head": 5}}, "experts_per_head is 5, more than"),
        ({"settings": {"row_format": "bfloat16"}}, "settings has row_format, which new_pack takes by itself"),
        ({"settings": {"num_experts": 64}}, "settings has num_experts, which new_pack takes by itself: num_experts=64"),
    ):
        with pytest.raises(ValueError, match=message):
            new_pack(model, "law", 16, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no PEER layer and is no model of transformers"):
        new_pack(nn.Linear(3, 3), "law", 16)
    peer = build("peer", ffw_layers="peer", peer={"num_experts": 16, "heads": 1, "experts_per_head": 2, "key_dim": 4})
    with pytest.raises(ValueError, match="PEER layers have their own"):
        new_pack(peer, "law", 16, settings={"heads": 1})


def test_a_second_pack_finds_the_same_layers_as_the_first() -> None:
    model = build("opt")
    add_pack(model, "law")
    assert new_pack(model, "medicine", 16) == list(holders(model))


def test_a_gate_opens_for_the_same_tokens_at_any_precision() -> None:
    torch.manual_seed(0)
    own, other = torch.randn(600, 16) + 0.1, torch.randn(600, 16)
    gates = [Gate(16), Gate(16)]
    for gate, bf16 in zip(gates, (False, True), strict=True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            gate.fit(own, other)
            found = gate(other)
        assert torch.equal(found, gates[0](other))


def test_a_loss_has_a_graph_where_all_gates_are_closed() -> None:
    model = build("llama").requires_grad_(False).eval()
    new_pack(model, "law", 16)
    for holder in holders(model).values():
        holder.by_name()["law"].gate.bias.fill_(-1)
        holder.train()
    before = model(IDS, labels=IDS).loss
    before.backward()
    rows = [holder.by_name()["law"].table.rows for holder in holders(model).values()]
    assert all(each.grad is not None and not each.grad.any() for each in rows)
    with choose_packs(model, [[]]):
        assert torch.equal(model(IDS, labels=IDS).loss, before)


def test_a_closed_gate_leaves_every_bit_and_an_open_one_multiplies() -> None:
    gate = Gate(4)
    gate.weight.copy_(torch.tensor([1.0, 0, 0, 0]))
    gate.bias.zero_()
    x = torch.tensor([[-3.0, 1, 1, 1], [0.0, 1, 1, 1], [3.0, 1, 1, 1]])
    assert gate(x).tolist() == [0, 0, torch.sigmoid(torch.tensor(3.0)).item()]
    model = build("llama")
    before = logits(model)
    add_pack(model, "law")
    for holder in holders(model).values():
        holder.by_name()["law"].gate.bias.fill_(-20)
    assert torch.equal(logits(model), before)


def test_a_fitted_gate_opens_for_its_own_text_and_not_for_other() -> None:
    model = build("llama")
    add_pack(model, "law", layers=["model.layers.2.mlp"])
    generator = torch.Generator().manual_seed(0)
    low, high = (torch.randint(a, b, (24, 16), generator=generator) for a, b in ((1, 32), (32, 64)))
    shares = fit_gates(model, "law", low[:16].split(4), high[:16].split(4), keep=0.9)
    assert 0.6 < shares["own_open"] <= 0.91
    assert shares["other_open"] < 0.2
    with choose_packs(model, [[]]):
        before = [logits(model, each[16:]) for each in (high, low)]
    after = [logits(model, each[16:]) for each in (high, low)]
    foreign, own = ((new != old).any(dim=-1).float().mean() for new, old in zip(after, before, strict=True))
    assert foreign < 0.25
    assert own > 0.5
    with pytest.raises(ValueError, match="no pack 'medicine' with gates"):
        fit_gates(model, "medicine", [low], [high])
