"""Several packs of a model without experts: in a row, taken out in any order, and ten that know their own text."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from peerlm.packs import choose_packs, load_pack, loaded_packs, new_pack, pack_parameters, save_pack, unload_pack
from peerlm.packs.fit import fit_gates
from peerlm.packs.plain import holders

from ..models import build, run

IDS = torch.arange(1, 28).view(3, 9)


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits  # type: ignore[no-any-return]


def add_pack(model: nn.Module, name: str, **options: object) -> None:
    """A pack that says something everywhere."""
    new_pack(model, name, 16, **options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    for parameter in pack_parameters(model, name):
        nn.init.normal_(parameter, generator=generator)


def test_three_in_a_row_leave_in_any_order_and_return_the_bits_of_those_that_stay(tmp_path: Path) -> None:
    model = build("llama")
    layers = {"art": None, "law": ["model.layers.0.mlp"], "medicine": ["model.layers.0.mlp", "model.layers.2.mlp"]}
    seen = {(): logits(model)}
    for name, paths in layers.items():
        add_pack(model, name, layers=paths)
        save_pack(model, name, tmp_path / name)
        seen[tuple(loaded_packs(model))] = logits(model)
    unload_pack(model, "art")
    seen["law", "medicine"] = logits(model)
    unload_pack(model, "medicine")
    seen["law",] = logits(model)
    unload_pack(model, "law")
    assert len({tuple(each.flatten().tolist()) for each in seen.values()}) == len(seen) == 6
    for names, expected in seen.items():
        for name in reversed(names):
            load_pack(model, tmp_path / name)
        assert torch.equal(logits(model), expected), names
        for name in names:
            unload_pack(model, name)
    assert torch.equal(logits(model), seen[()])
    assert not holders(model)


def test_of_ten_packs_the_one_of_the_text_speaks_on_mixed_text() -> None:
    model = build("llama", hidden_size=64)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3 + 6 * each, 9 + 6 * each, (25, 16), generator=generator) for each in range(10)]
    for number, own in enumerate(texts):
        add_pack(model, f"pack{number}", layers=["model.layers.2.mlp"])
        other = torch.cat([text[:24] for text in texts if text is not own])
        fit_gates(model, f"pack{number}", [own[:24]], [other], keep=0.99)
    (holder,) = holders(model).values()
    read: list[Tensor] = []
    handle = holder.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    mixed = torch.cat([text[24:] for text in texts])  # one sequence of each text, which no gate was fitted on
    with choose_packs(model, [[]]):
        before = logits(model, mixed)
    handle.remove()
    speaks = torch.stack([holder.by_name()[f"pack{each}"].gate(read[0]) for each in range(10)])  # packs, texts, tokens
    share = (speaks > 0).float().mean(dim=-1)
    assert share.diagonal().min() > 0.5
    assert share.diagonal().mean() > 0.8
    assert (share.sum() - share.diagonal().sum()) / 90 < 0.1
    assert torch.equal(share.argmax(dim=0), torch.arange(10))
    with choose_packs(model, [[f"pack{each}"] for each in range(10)]):
        own = logits(model, mixed)
    changed = ((logits(model, mixed) - before).norm(dim=-1) / (own - before).norm(dim=-1).clamp_min(1e-6)).median()
    assert 0.8 < changed < 1.25  # what all ten add is what the right one adds


def test_the_command_says_whether_a_plain_model_takes_a_pack(
    tmp_path: Path, make_tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = make_tokenizer()
    for name, seed in (("base", 0), ("other", 1)):
        model = build("llama", vocab_size=len(tokenizer))
        if seed:
            nn.init.normal_(model.lm_head.weight)  # type: ignore[arg-type, union-attr]
        else:
            add_pack(model, "law")
            save_pack(model, "law", tmp_path / "law")
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    assert run("pack", "inspect", tmp_path / "law", "--for", tmp_path / "base") == 0
    assert "law" in capsys.readouterr().out
    assert run("pack", "inspect", tmp_path / "law", "--for", tmp_path / "other") == 2
    assert "was made for the model" in capsys.readouterr().err
