"""The experts of packs beside feed-forward layers are looked at: the tokens that open a gate, times the gate."""

from pathlib import Path

import pytest
import torch

from peerlm.interpret import Edit, change_of_edits, collect, find_inspected_layers, inspect
from peerlm.interpret.edits import edit, edit_effects
from peerlm.packs import choose_packs, new_pack, pack_parameters, save_pack
from peerlm.packs.plain import holders

from ..models import build, run
from .test_page import data_of

TOKENS = torch.randint(64, (45,), generator=torch.Generator().manual_seed(3))


def taught(name: str = "llama", packs: tuple[str, ...] = ("law",), **changes: int):
    """A model with packs that write, whose gates open at about half of the tokens."""
    model = build(name, **changes)
    for pack in packs:
        new_pack(model, pack, 16, layers=["model.layers.1.mlp", "model.layers.2.mlp"], seed=len(pack))
        generator = torch.Generator().manual_seed(len(pack))
        for parameter in pack_parameters(model, pack):
            torch.nn.init.normal_(parameter, generator=generator)
    for holder in holders(model).values():
        for part in holder.by_name().values():
            part.gate.weight.normal_(generator=generator)
            part.gate.bias.zero_()
    return model


def test_strengths_times_vectors_are_what_the_pack_adds() -> None:
    model = taught()
    layers = find_inspected_layers(model)
    assert [(layer.number, layer.kind) for layer in layers] == [(1, "PEER of a pack"), (2, "PEER of a pack")]
    wrote = {layer.number: [] for layer in layers}
    for layer in layers:
        layer.pack.register_forward_hook(
            lambda module, args, y, number=layer.number: wrote[number].append(
                torch.zeros_like(args[0]) if y is None else y.detach()
            )
        )
    collected = collect(model, layers, TOKENS, context=15, shown=45, experts_per_token=32)
    for layer, record in zip(layers, collected.layers, strict=True):
        strength = record.weight_SM * record.activation_SM
        sums = (strength[..., None] * layer.vectors(record.expert_SM.clamp_min(0))).sum(dim=1)
        added = torch.cat(wrote[layer.number])
        torch.testing.assert_close(sums, added, rtol=1e-4, atol=1e-4)
        silent = (added == 0).all(dim=-1)
        assert 5 < silent.sum() < 40
        assert torch.equal(record.fired_S == 0, silent)


def test_edits_of_several_experts_at_once_are_those_of_each_alone() -> None:
    model = taught()
    record = collect(model, find_inspected_layers(model), TOKENS, context=15, shown=45).layers[0]
    first, second = record.importance_N.topk(2).indices.tolist()
    edits = [Edit(1, first, 0.0), Edit(1, second, 2.0)]
    alone = []
    with torch.no_grad():
        for item in edits:
            with edit(model, item.layer, item.expert, item.factor):
                alone.append(model(TOKENS[None, :15]).logits.log_softmax(-1))
        before = model(TOKENS[None, :15]).logits.log_softmax(-1)
    for effect, after in zip(edit_effects(model, TOKENS[:15], edits, context=15), alone, strict=True):
        change = (before - after)[0, :-1].gather(-1, TOKENS[1:15, None])[:, 0]
        torch.testing.assert_close(effect.change[1:].float(), change, rtol=1e-4, atol=1e-5)
        assert effect.change.abs().max() > 1e-4


def test_a_pack_that_says_nothing_has_experts_that_never_fire() -> None:
    model = taught(packs=("law", "medicine"))
    layers = find_inspected_layers(model)
    assert [layer.number for layer in layers] == [0, 1, 2, 3]  # two in each block: counted
    with choose_packs(model, [["law"]]):
        collected = collect(model, layers, TOKENS, context=15, shown=45)
        assert [int(record.usage.retrievals_N.sum()) > 0 for record in collected.layers] == [True, False, True, False]
        silent = edit_effects(model, TOKENS, [Edit(1, 0, 0.0)], context=15)
    assert silent[0].change.abs().max() == 0


def test_the_command_writes_the_page_of_a_pack(tokenizer, text: Path, tmp_path: Path, capsys) -> None:
    model = taught(vocab_size=len(tokenizer))
    save_pack(model, "law", tmp_path / "law")
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    page = tmp_path / "page.html"
    figures = inspect(tmp_path / "base", text, output=page, packs=[tmp_path / "law"], edits=4, progress=False)
    assert [layer["kind"] for layer in figures["layers"]] == ["PEER of a pack"] * 2
    assert any(row["change"] for row in figures["edits"])
    assert len(data_of(page.read_text(encoding="utf-8"))["layers"]) == 2
    best = figures["layers"][1]["experts"][0]["expert"]
    change = change_of_edits(tmp_path / "base", text, [Edit(2, best, 0.0)], packs=[tmp_path / "law"], progress=False)
    assert change["change"] != 0
    assert run("inspect", tmp_path / "base", "--text", text, "--pack", tmp_path / "law", "--output", page) == 2
    assert "exists already" in capsys.readouterr().err
    assert run("inspect", tmp_path / "base", "--text", text, "--output", tmp_path / "new.html") == 2
    assert "a pack with --pack" in capsys.readouterr().err


def test_packs_in_layers_with_experts_are_refused(new_model) -> None:
    model = new_model()
    new_pack(model, "law", 16)
    with pytest.raises(Exception, match=r"ffw has packs, whose experts share its places"):
        find_inspected_layers(model)
