"""Conversion to retrieved neurons: exact with all of them, saved and loaded, better with a learned index."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peerlm.convert import convert
from peerlm.convert.neurons import NeuronLayer, fit_neurons
from peerlm.data.tokenizer import open_tokenizer
from peerlm.evaluate import held_out_loss, load_model
from peerlm.evaluate.windows import text_windows

from ..models import ARCHITECTURES, batch, build, logits, run

SETTINGS: dict[str, Any] = {"heads": 2, "key_dim": 8}
QUICK = {"steps": 3}


def samples(model: Any, number: int = 12) -> list[dict[str, torch.Tensor]]:
    return [batch(model, seed=seed, masked=seed % 2 == 0) for seed in range(number)]


def layers_of(model: Any) -> dict[str, NeuronLayer]:
    return {path: module for path, module in model.named_modules() if isinstance(module, NeuronLayer)}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.usefixtures("float64")
def test_all_neurons_are_the_dense_model(name: str, tmp_path: Path) -> None:
    model = build(name)
    inputs = batch(model, seed=99, masked=True)
    expected = logits(model, inputs)
    convert(model, mode="replace", init="neurons", samples=samples(model, 3), fit=QUICK, share=1.0, **SETTINGS)
    assert len(layers_of(model)) == 3
    found = logits(model, inputs)
    torch.testing.assert_close(found, expected)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(logits(loaded, inputs), found)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_a_learned_index_errs_less_than_a_random_one(name: str) -> None:
    dense = build(name)
    inputs = batch(dense, seed=99)
    expected = logits(dense, inputs)
    learned = convert(
        copy.deepcopy(dense),
        mode="replace",
        init="neurons",
        samples=samples(dense),
        fit={"steps": 60},
        share=0.4,
        **SETTINGS,
    )
    random = copy.deepcopy(learned)
    for layer in layers_of(random).values():
        layer.index.reset_parameters()
        layer.mean_rest.zero_()
    errors = [(logits(model, inputs) - expected).norm() for model in (learned, random)]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("settings", [SETTINGS, {"index": "reads", "sketch": 4}], ids=["keys", "reads"])
def test_pooled_layers_share_one_table_and_come_back(settings: dict[str, Any], tmp_path: Path) -> None:
    model = build("llama")
    inputs = batch(model, seed=99)
    convert(
        model, mode="replace", init="neurons", samples=samples(model, 3), fit=QUICK, share=0.5, pool=True, **settings
    )
    assert len({id(layer.table) for layer in layers_of(model).values()}) == 1
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert len({id(layer.table) for layer in layers_of(loaded).values()}) == 1
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


def test_learning_again_and_its_report() -> None:
    model = build("llama").train()
    convert(
        model, mode="replace", init="neurons", samples=samples(model, 3), fit=QUICK, layers=[1], share=0.5, **SETTINGS
    )
    told: list[tuple[str, int, int]] = []
    fits = fit_neurons(model, samples(model), steps=4, report=lambda *news: told.append(news))
    assert list(fits) == ["model.layers.1.mlp.peer"]
    assert told == [("model.layers.1.mlp.peer", step, 4) for step in (1, 2, 3, 4)]
    assert all(module.training for module in model.modules())
    assert layers_of(model)["model.layers.1.mlp.peer"].share == 0.5


def test_padding_teaches_nothing() -> None:
    model = build("llama")
    convert(model, mode="replace", init="neurons", samples=samples(model, 3), fit=QUICK, share=0.5, **SETTINGS)
    padded = batch(model, masked=True)
    other = {**padded, "input_ids": padded["input_ids"].masked_fill(padded["attention_mask"] == 0, 60)}
    tables = []
    for sample in (padded, other):
        torch.manual_seed(0)
        fitted = copy.deepcopy(model)
        fit_neurons(fitted, [sample] * 4, steps=3)
        tables.append(fitted.state_dict())
    assert all(torch.equal(tables[0][name], tables[1][name]) for name in tables[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": None}, "init='neurons' learns from samples; pass samples="),
        ({"samples": []}, "there are no samples to learn the index from"),
        ({"mode": "beside"}, "init is 'neurons'; with mode='beside' choose one of random"),
        ({"shares": 0.5}, "a layer of retrieved neurons has no setting 'shares'; did you mean 'share'?"),
        ({"share": 1.5}, "share is 1.5; it is the share of neurons"),
        ({"init": "random", "num_experts": 64}, "init='random' does not learn from samples; leave samples out"),
    ],
)
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_mistakes_change_nothing(name: str, arguments: dict[str, Any], message: str) -> None:
    model = build(name)
    before, config, inputs = str(model), model.config.to_dict(), batch(model, masked=True)
    expected = logits(model, inputs)
    settings = {} if arguments.get("init") == "random" else SETTINGS
    with pytest.raises(ValueError, match=message):
        convert(
            model,
            **{
                "mode": "replace",
                "init": "neurons",
                "samples": samples(model, 2),
                "fit": QUICK,
                **settings,
                **arguments,
            },
        )
    assert (str(model), model.config.to_dict()) == (before, config)
    assert torch.equal(logits(model, inputs), expected)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_nan_is_noticed_and_the_model_is_as_it_was() -> None:
    model = build("llama")
    before = str(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="writes NaN"):
        convert(model, mode="replace", init="neurons", samples=samples(model, 2), layers=[1], **SETTINGS)
    assert str(model) == before


def test_a_model_without_retrieved_neurons_is_refused() -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM has no retrieved neurons; convert it with init='neurons'"):
        fit_neurons(build("llama"), [])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    words = {"<|endoftext|>": 0, **{f"w{number}": number for number in range(1, 64)}}
    engine = Tokenizer(models.WordLevel(words, unk_token="w1"))
    engine.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    build("llama", max_position_embeddings=256).save_pretrained(tmp_path / "llama")
    PreTrainedTokenizerFast(tokenizer_object=engine, eos_token="<|endoftext|>").save_pretrained(tmp_path / "llama")
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(1, 64, (900,), generator=generator).tolist()
    (tmp_path / "text.txt").write_text(" ".join(f"w{number}" for number in numbers))
    return tmp_path


@pytest.mark.usefixtures("float64")
def test_the_command(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--mode=replace", "--init=neurons", "--set=share=0.5", "--set=heads=2", "--set=key_dim=8", "--json=-"]
    text = f"--text={folder / 'text.txt'}"
    assert run("convert", folder / "llama", folder / "out", *arguments, text) == 0
    row = json.loads(capfd.readouterr().out)
    assert row["init"] == "neurons"
    windows = text_windows(open_tokenizer(folder / "llama"), [folder / "text.txt"], context=256)
    for name, model in {"perplexity_before": "llama", "perplexity_after": "out"}.items():
        loss = held_out_loss(load_model(folder / model)[0], windows[-1:], batch_size=8)
        assert row[name] == pytest.approx(math.exp(loss))
    assert row["perplexity_after"] != row["perplexity_before"]
    assert list(row["layer_errors"]) == [f"model.layers.{number}.mlp.peer" for number in range(3)]
    dense, fitted = (load_model(folder / name)[0] for name in ("llama", "out"))
    hidden = torch.randn(64, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for number, error in enumerate(row["layer_errors"].values()):
        whole, part = (model.get_submodule(f"model.layers.{number}.mlp") for model in (dense, fitted))
        with torch.no_grad():
            found = (part(hidden) - whole(hidden)).norm() / whole(hidden).norm()
        assert 0.3 < error / found.item() < 3  # on other inputs
    card = (folder / "out" / "README.md").read_text()
    assert f"{row['perplexity_before']:.2f} before, {row['perplexity_after']:.2f} after" in card
    assert f"| `model.layers.2.mlp.peer` | {row['layer_errors']['model.layers.2.mlp.peer']:.3f} |" in card
    assert "PEER has to be trained" not in card
    assert run("generate", folder / "out", "w3 w4", "--tokens", "3") == 0
    assert run("convert", folder / "llama", folder / "again", *arguments) == 2
    assert "on the command line --text FILE" in capfd.readouterr().err
    assert run("convert", folder / "llama", folder / "again", *arguments, f"--text={folder / 'none.txt'}") == 2
    assert "none.txt is not a file" in capfd.readouterr().err
