"""A pack teaches a model without experts: new text improves, other text keeps its loss, the lower blocks rest."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peerlm.continual import LearnConfig, learn, stream
from peerlm.continual.pack_per_stage import PackPerStage
from peerlm.data.tokenizer import train_tokenizer
from peerlm.errors import UserError
from peerlm.evaluate import load_model
from peerlm.packs.api import unload_pack
from peerlm.packs.opening import openings
from peerlm.train.training import Training

from ..models import run
from .conftest import WORDS

CONTEXT = 32


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    """A small Llama that has learned the known text."""
    folder = tmp_path_factory.mktemp("llama")
    written = {name: (texts / f"{name}.txt").read_text() for name in WORDS}
    tokenizer = train_tokenizer(written.values(), vocab_size=300)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=2,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    ids = torch.tensor(tokenizer(written["known"]).input_ids)
    windows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(30):
        batch = windows[torch.arange(step * 8, step * 8 + 8) % len(windows)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def taught(configure: Callable[..., LearnConfig], llama: Path, texts: Path) -> Callable[..., LearnConfig]:
    def build(**changes: Any) -> LearnConfig:
        values: dict[str, Any] = {
            "model": str(llama),
            "method": "pack",
            "memory": {"background": [str(texts / "known.txt")], "kl": 0.0, "replay": 0.0},
            "settings": {"experts": 64, "epochs": 4, "keep": 0.9, "rate": 1, "layers": ["model.layers.3.mlp"]},
            "precision": "fp32",
            "budget": None,
            "context": CONTEXT,
            "optim": {"learning_rate": 3e-2},
        }
        return configure(**(values | changes))

    return build


def test_new_text_is_learned_and_known_text_is_kept(taught: Callable[..., LearnConfig], llama: Path) -> None:
    config = taught(only=1)
    rows = learn(config, progress=False)
    before, after = rows[0]["loss"], rows[1]["loss"]
    assert after["code"] < 0.93 * before["code"]
    assert abs(after["background"] / before["background"] - 1) < 0.005
    assert rows[1]["gates"]["own_open"] > 0.75  # the mark that begins a document is the same in every text
    assert rows[1]["gates"]["other_open"] < 0.15
    report = json.loads((Path(config.run) / "report.json").read_text())
    assert report["code"]["after"] == after["code"]
    assert report["background"]["change_percent"] == pytest.approx(
        100 * (after["background"] / before["background"] - 1)
    )
    stage = Path(config.run) / "stages" / "1-code"
    assert sorted(path.name for path in stage.iterdir()) == ["gates.json", "log.jsonl", "pack", "summary.json"]
    plain, _ = load_model(llama)
    model, _ = load_model(llama, [stage / "pack"])
    ids = torch.arange(3, 35)[None]
    unload_pack(model, "code")
    assert torch.equal(model(ids).logits, plain(ids).logits)


def test_a_second_pack_is_silent_on_the_text_of_the_first(taught: Callable[..., LearnConfig]) -> None:
    rows = learn(taught(), progress=False)
    first, second = rows[1]["loss"], rows[2]["loss"]
    assert second["law"] < 0.97 * first["law"]
    assert abs(second["code"] / first["code"] - 1) < 0.02


def test_a_stopped_stage_resumes_to_the_same_bits(
    taught: Callable[..., LearnConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = taught(only=1, run=str(tmp_path / "whole"), budget={"steps": 6})
    learn(whole, progress=False)
    halves = taught(only=1, run=str(tmp_path / "halves"), budget={"steps": 6}, checkpoint_every=3)

    calls = 0
    train_mode = PackPerStage.train_mode

    def sometimes(self: PackPerStage, model: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise KeyboardInterrupt
        train_mode(self, model)

    monkeypatch.setattr(PackPerStage, "train_mode", sometimes)
    with pytest.raises(KeyboardInterrupt):
        learn(halves, progress=False)
    monkeypatch.setattr(PackPerStage, "train_mode", train_mode)
    learn(halves, resume=True, progress=False)
    packs = [Path(config.run) / "stages" / "1-code" / "pack" / "manifest.json" for config in (whole, halves)]
    assert json.loads(packs[0].read_text())["sha256"] == json.loads(packs[1].read_text())["sha256"]


def test_the_commands_learn_evaluate_and_generate(
    llama: Path, texts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "code.txt").write_text((texts / "code.txt").read_text())
    output = tmp_path / "learned"
    options = ("--method", "pack", "--set", "experts=16", "--steps", 2, "--context", CONTEXT)
    assert run("learn", llama, "--text", docs, *options, "--background", texts / "known.txt", "-o", output) == 0
    out = capfd.readouterr().out
    assert "change percent" in out
    pack = output / "stages" / "1-docs" / "pack"
    assert f"0.0 MB: load it with --pack {pack}" in out
    assert run("eval", llama, texts / "code.txt", "--pack", pack, "--context", CONTEXT, "--limit", 300) == 0
    assert run("generate", llama, "def", "--pack", pack, "--tokens", 4) == 0


def test_the_embedded_corpus_is_the_background_where_none_is_given(
    taught: Callable[..., LearnConfig], monkeypatch: pytest.MonkeyPatch, texts: Path
) -> None:
    corpus = texts / "known.txt"
    monkeypatch.setattr("peerlm.data.sources._demo_corpus", lambda: corpus)
    config = taught(only=1, memory={"background": [], "kl": 0.0, "replay": 0.0}, budget={"steps": 2})
    rows = learn(config, progress=False)
    assert set(rows[1]["loss"]) == {"code", "background"}


@pytest.mark.parametrize("method", ["pack", "lora"])
def test_products_are_bfloat16_where_the_processor_has_them_and_stay_so(
    method: str, taught: Callable[..., LearnConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()

    def watched(self: Training) -> Any:
        seen.add(self.config.precision)
        assert self.model.config._attn_implementation == "eager"
        return torch.autocast("cpu", dtype=torch.bfloat16)

    monkeypatch.setattr(Training, "autocast", watched)
    monkeypatch.setattr(stream, "has_bf16_products", lambda device: True)
    settings: dict[str, Any] = {"experts": 16} if method == "pack" else {"rank": 2}
    config = taught(only=1, method=method, settings=settings, precision="auto", budget={"steps": 1})
    rows = learn(config, progress=False)
    assert rows[0]["precision"] == "bf16"
    assert seen == {"bf16"}
    monkeypatch.setattr(stream, "has_bf16_products", lambda device: False)
    assert learn(config, resume=True, progress=False) == rows


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"megabytes": 0.001}, "have no room for 4 experts in each of 4 layers"),
        ({"layers": ["model.layers.9.mlp"]}, "the feed-forward layers are"),
        ({"keep": 0}, "must be above 0, at most 1"),
        ({"epochs": -1}, "must be above 0"),
        ({"rate": 0}, "pack.rate = 0.0: must be above 0"),
    ],
)
def test_impossible_settings_are_said(
    settings: dict[str, Any], message: str, taught: Callable[..., LearnConfig]
) -> None:
    with pytest.raises(UserError, match=message):
        learn(taught(only=1, settings=settings), progress=False)


def test_gates_tell_beginnings_of_texts_apart_where_only_the_new_text_has_short_documents(
    taught: Callable[..., LearnConfig], llama: Path, tmp_path: Path
) -> None:
    random = np.random.default_rng(1)
    long = {name: " ".join(random.choice(WORDS[name].split(), size=2000)) for name in ("known", "code")}
    short = "\n<|endoftext|>\n".join(long["code"][start : start + 40] for start in range(0, 8000, 40))
    (tmp_path / "known.txt").write_text(f"{long['known']}\n<|endoftext|>\n{long['known'][::-1]}")
    (tmp_path / "code.txt").write_text(short)
    stages = [{"name": "code", "text": [str(tmp_path / "code.txt")]}]
    learn(
        taught(only=1, stages=stages, memory={"background": [str(tmp_path / "known.txt")]}, budget={"steps": 1}),
        progress=False,
    )
    model, tokenizer = load_model(llama, [tmp_path / "run/stages/1-code/pack"])
    opened = {}
    for name, text in long.items():
        starts = [tokenizer(text[100 * k :]).input_ids[1:5] for k in range(20)]
        ids = torch.tensor([[tokenizer.eos_token_id, *each] for each in starts])
        opened[name] = openings(model, ids)["code"][:, 1:].mean().item()
    assert opened["code"] > 0.5
    assert opened["known"] < 0.3
