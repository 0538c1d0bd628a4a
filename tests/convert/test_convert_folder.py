"""`peerlm convert`: folders in and out, and users' mistakes as one sentence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, BertForMaskedLM, PreTrainedTokenizerFast

from peerlm.evaluate import load_model, sample_text
from peerlm.layers import PEER

from ..models import PEER_SETTINGS, assert_refused, batch, build, contents, logits, run

SETTINGS = [f"--set={name}={value}" for name, value in PEER_SETTINGS.items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved models, one with a tokenizer, and folders to make mistakes with."""
    folder = tmp_path_factory.mktemp("convert")
    words = {"<|endoftext|>": 0, **{f"w{number}": number for number in range(1, 64)}}
    engine = Tokenizer(models.WordLevel(words, unk_token="w1"))
    engine.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    for name in ("llama", "bert", "peer", "mixtral"):
        build(name).save_pretrained(folder / name)
    PreTrainedTokenizerFast(tokenizer_object=engine, eos_token="<|endoftext|>").save_pretrained(folder / "llama")
    (folder / "empty").mkdir()
    (folder / "mine.txt").write_text("do not overwrite")
    (folder / "cut").mkdir()
    for path in (folder / "bert").iterdir():
        (folder / "cut" / path.name).write_bytes(path.read_bytes()[: -7 if path.suffix == ".safetensors" else None])
    for name, change in (("foreign", {"architectures": ["BertForPoetry"]}), ("odd", {"hidden_size": "wide"})):
        (folder / name).mkdir()
        config = json.loads((folder / "bert" / "config.json").read_text()) | change
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ["llama", "bert", "peer"])
def test_there_and_back(name: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("convert", folder / name, tmp_path / "there", *SETTINGS, "--layers", "0,-1", "--json=-") == 0
    row = json.loads(capfd.readouterr().out)
    assert len(row["layers"]) == 2
    assert (row["mode"], row["init"]) == ("beside", "random")
    peer = sum(parameter.numel() for parameter in PEER(16, **PEER_SETTINGS).parameters())
    assert row["parameters_after"] - row["parameters_before"] == 2 * peer
    assert run("convert", tmp_path / "there", tmp_path / "back", "--undo") == 0
    assert "parameters after" in capfd.readouterr().out
    assert contents(tmp_path / "back") == contents(folder / name)
    assert not list(tmp_path.glob(".partial*"))


def test_the_converted_model_is_read_by_the_other_commands(folder: Path, tmp_path: Path) -> None:
    assert run("convert", folder / "llama", tmp_path / "out", "--mode=replace", "--layers=middle", *SETTINGS) == 0
    card = (tmp_path / "out/README.md").read_text()
    assert "`llama` (LlamaForCausalLM) with PEER layers in place of 1 of its feed-forward layers" in card
    assert "import peerlm\nfrom transformers import LlamaForCausalLM\n\nmodel = LlamaForCausalLM.from_pre" in card
    model, tokenizer = load_model(tmp_path / "out")
    assert sum(isinstance(module, PEER) for module in model.modules()) == 1
    assert sample_text(model, tokenizer, "w3 w4", tokens=3)
    original: Any = AutoTokenizer.from_pretrained(folder / "llama")
    assert tokenizer.get_vocab() == original.get_vocab()
    assert (
        model.generation_config.to_dict()
        == AutoModelForCausalLM.from_pretrained(folder / "llama").generation_config.to_dict()
    )


def test_the_head_that_was_saved_is_kept(folder: Path, tmp_path: Path) -> None:
    assert run("convert", folder / "bert", tmp_path / "out", *SETTINGS) == 0
    loaded, original = (BertForMaskedLM.from_pretrained(path) for path in (tmp_path / "out", folder / "bert"))
    assert torch.equal(logits(loaded, batch(loaded)), logits(original, batch(original)))


def test_new_weights_differ_by_seed_alone(folder: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run("convert", folder / "bert", tmp_path / name, *SETTINGS, f"--seed={seed}") == 0
    weights = {name: contents(tmp_path / name)["model.safetensors"] for name in "abc"}
    assert weights["a"] == weights["b"] != weights["c"]


MISTAKES: dict[str, tuple[Callable[[Path], list[Any]], str]] = {
    "no such folder": (lambda f: [f / "none", f / "new"], "none is not a folder"),
    "no model in it": (lambda f: [f / "empty", f / "new"], "is neither a run"),
    "weights cut short": (lambda f: [f / "cut", f / "new"], "holds no model that can be read"),
    "a size that is no number": (lambda f: [f / "odd", f / "new"], "holds no model that can be read"),
    "more experts than memory": (
        lambda f: [f / "bert", f / "new", "--set=num_experts=1000000000000", "--set=heads=1", "--set=key_dim=2"],
        "memory",
    ),
    "seed too large": (lambda f: [f / "bert", f / "new", "--seed=99999999999999999999"], "seed is 9999"),
    "a word for a switch": (lambda f: [f / "bert", f / "new", "--set=gated=no"], "gated is 'no'; it must be true or"),
    "unknown class": (lambda f: [f / "foreign", f / "new"], "of the architecture 'BertForPoetry'"),
    "output exists": (lambda f: [f / "bert", f / "mine.txt"], "mine.txt exists already; name a new folder"),
    "output is the input": (lambda f: [f / "bert", f / "bert"], "exists already"),
    "mode unknown": (lambda f: [f / "bert", f / "new", "--mode=inside"], "choose one of beside, replace"),
    "init unknown": (lambda f: [f / "bert", f / "new", "--init=zero"], "init is 'zero'"),
    "layers unreadable": (lambda f: [f / "bert", f / "new", "--layers=1-3"], "write all, middle, or numbers"),
    "layers out of range": (lambda f: [f / "bert", f / "new", "--layers=0,7"], "layers has 7"),
    "setting unknown": (lambda f: [f / "bert", f / "new", "--set=head=2"], "did you mean 'heads'"),
    "setting without value": (lambda f: [f / "bert", f / "new", "--set=heads"], "write it as key=value"),
    "experts no square": (lambda f: [f / "bert", f / "new", "--set=num_experts=65"], "the nearest is 64"),
    "experts no number": (lambda f: [f / "bert", f / "new", "--set=num_experts=many"], "whole number"),
    "dropout no number": (lambda f: [f / "bert", f / "new", "--set=dropout=much"], "dropout is 'much'; it must be a n"),
    "norm no name": (lambda f: [f / "bert", f / "new", "--set=query_norm=[1]"], "query_norm is [1]; it must be a word"),
    "mixture of experts": (lambda f: [f / "mixtral", f / "new"], "mixtures of experts"),
    "a start of no text": (lambda f: [f / "bert", f / "new", "--document-start=none"], "but no text is read; name one"),
    "nothing to undo": (lambda f: [f / "bert", f / "new", "--undo"], "is not converted"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_loses_nothing(
    name: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    build_command, named = MISTAKES[name]
    assert_refused(named, folder, capfd, "convert", *build_command(folder))


def test_weights_that_are_missing_or_unknown_are_named(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, changes, said in (
        ("missing", {"num_hidden_layers": 4}, "lacks weights, such as bert.encoder.layer.3"),
        ("unknown", {"num_hidden_layers": 2}, "has unknown weights, such as bert.encoder.layer.2"),
    ):
        (tmp_path / name).mkdir()
        for path in (folder / "bert").iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
        config = json.loads((tmp_path / name / "config.json").read_text()) | changes
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        assert run("convert", tmp_path / name, tmp_path / "new") == 2
        assert said in capfd.readouterr().err
