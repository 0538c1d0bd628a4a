"""`peerlm grow` and `peerlm shrink`: folders in and out, and users' mistakes as one sentence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peerlm.convert import saved
from peerlm.data.tokenizer import open_tokenizer, train_tokenizer
from peerlm.evaluate.windows import text_windows
from peerlm.growth import folder as resize_folder
from peerlm.growth import grow
from peerlm.model import PeerConfig, PeerForCausalLM
from peerlm.testing import assert_within_budget, definition, float64

from ..models import assert_refused, build, contents, run

IDS = torch.arange(18).view(2, 9)


def small_model(pairing: str) -> PeerForCausalLM:
    config = PeerConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=32,
        ffw_layers=["peer", "dense", "peer"],
        peer={"num_experts": 16, "heads": 2, "experts_per_head": 3, "key_dim": 8, "pairing": pairing},
    )
    return PeerForCausalLM(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved models, and folders to make mistakes with."""
    folder = tmp_path_factory.mktemp("grow")
    for pairing in ("shells", "row-major"):
        small_model(pairing).save_pretrained(folder / pairing)
    (folder / "shells" / "tokenizer.json").write_text("{}")
    grow(small_model("shells"), 36).save_pretrained(folder / "closed")
    build("llama").save_pretrained(folder / "llama")
    (folder / "mine.txt").write_text("do not overwrite")
    (folder / "cut").mkdir()
    for path in (folder / "shells").iterdir():
        (folder / "cut" / path.name).write_bytes(path.read_bytes()[: -7 if path.suffix == ".safetensors" else None])
    return folder


def logits(folder: Path) -> torch.Tensor:
    return PeerForCausalLM.from_pretrained(folder).eval()(IDS).logits.detach()


@pytest.mark.parametrize(("pairing", "options"), [("shells", []), ("row-major", ["--renumber"])])
def test_a_grown_folder_gives_the_same_logits(
    pairing: str, options: list[str], folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = contents(folder)
    assert run("grow", folder / pairing, tmp_path / "out", "--num-experts=49", "--json=-", *options) == 0
    row = json.loads(capfd.readouterr().out)
    assert row["layers"] == ["model.layers.0.ffw", "model.layers.2.ffw"]
    assert (row["experts_before"], row["experts_after"], row["opening"]) == (16, 49, 0)
    assert row["parameters_after"] - row["parameters_before"] == 2 * (2 * 16 * 33 + 2 * 4 * 3)
    assert torch.equal(logits(tmp_path / "out"), logits(folder / pairing))
    assert (tmp_path / "out" / "tokenizer.json").exists() == (pairing == "shells")
    assert contents(folder) == before
    assert not list(tmp_path.glob(".partial*"))


def test_a_grown_folder_grows_on_once_it_is_open(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("grow", folder / "shells", tmp_path / "a", "--num-experts=25", "--opening=1") == 0
    assert "experts after" in capfd.readouterr().out
    assert run("grow", tmp_path / "a", tmp_path / "b", "--num-experts=64", "--opening=0.5") == 0
    loaded = PeerForCausalLM.from_pretrained(tmp_path / "b")
    assert loaded.config.peer["grown_from"] == 25
    assert {module.opening.item() for module in loaded.modules() if hasattr(module, "opening")} == {0.5}


def test_new_weights_differ_by_seed_alone(folder: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run("grow", folder / "shells", tmp_path / name, "--num-experts=36", f"--seed={seed}") == 0
    a, b, c = (contents(tmp_path / name)["model.safetensors"] for name in "abc")
    assert a == b != c
    rows = [load_file(tmp_path / name / "model.safetensors")["model.layers.0.ffw.experts.rows"] for name in "ac"]
    assert torch.equal(rows[0][:16], rows[1][:16])
    assert not torch.equal(rows[0][16:], rows[1][16:])


def test_an_interrupted_growth_leaves_nothing_behind(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(folder)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(saved.shutil, "copyfile", fail)
    with pytest.raises(KeyboardInterrupt):
        resize_folder.grow_folder(folder / "shells", tmp_path / "out", 36)
    assert list(tmp_path.iterdir()) == []
    assert contents(folder) == before


MISTAKES: dict[str, tuple[Callable[[Path], list[Any]], str]] = {
    "no such folder": (lambda f: [f / "none", f / "new", "--num-experts=36"], "none is not a folder"),
    "weights cut short": (lambda f: [f / "cut", f / "new", "--num-experts=36"], "holds no model that can be read"),
    "output exists": (lambda f: [f / "shells", f / "mine.txt", "--num-experts=36"], "mine.txt exists already"),
    "no square": (lambda f: [f / "shells", f / "new", "--num-experts=37"], "the nearest is 36"),
    "too few": (lambda f: [f / "shells", f / "new", "--num-experts=9"], "'model.layers.0.ffw' has 16; give a larger"),
    "none": (lambda f: [f / "shells", f / "new", "--num-experts=0"], "num_experts is 0; it must be at least 1"),
    "row by row": (
        lambda f: [f / "row-major", f / "new", "--num-experts=36"],
        "renumber them as well, with --renumber",
    ),
    "still closed": (lambda f: [f / "closed", f / "new", "--num-experts=64"], "grew from 16 experts and is open at 0"),
    "opened too far": (lambda f: [f / "shells", f / "new", "--num-experts=36", "--opening=2"], "opening is 2.0; take"),
    "too many": (lambda f: [f / "shells", f / "new", "--num-experts=1000000000000"], "cannot grow"),
    "seed too large": (lambda f: [f / "shells", f / "new", "--num-experts=36", f"--seed={2**64}"], "fit into 64 bits"),
    "keys of no text": (
        lambda f: [f / "shells", f / "new", "--num-experts=36", "--keys=crowded"],
        "--keys crowded depends on what the model reads; give --text FILE too",
    ),
    "no such keys": (
        lambda f: [f / "shells", f / "new", "--num-experts=36", "--keys=old"],
        "keys is 'old'; choose one of random, crowded, data",
    ),
    "keys without text": (
        lambda f: [f / "shells", f / "new", "--num-experts=36", "--keys=data"],
        "--keys data depends",
    ),
    "no PEER layer": (lambda f: [f / "llama", f / "new", "--num-experts=36"], "LlamaForCausalLM has no PEER layer"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_loses_nothing(
    name: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    build_command, named = MISTAKES[name]
    assert_refused(named, folder, capfd, "grow", *build_command(folder))


@pytest.fixture(scope="module")
def readable(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A saved model with a tokenizer, and text."""
    folder = tmp_path_factory.mktemp("readable")
    text = folder / "text.txt"
    text.write_text("one two three four five six seven eight nine ten " * 80)
    tokenizer = train_tokenizer([text.read_text()], vocab_size=300)
    model = PeerForCausalLM(
        PeerConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=256,
            peer={"num_experts": 20**2, "heads": 2, "experts_per_head": 2, "key_dim": 8, "pairing": "shells"},
        )
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model", text


def test_a_folder_shrinks_by_what_a_text_uses(
    readable: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, text = readable
    assert run("shrink", model, tmp_path / "a", "--text", text, "--json=-") == 0
    row = json.loads(capfd.readouterr().out)
    assert row["experts_before"] == 400
    assert row["experts_after"] < 400
    assert run("shrink", model, tmp_path / "b", "--text", text, "--num-experts=16") == 0
    assert "experts after" in capfd.readouterr().out
    sizes = [PeerForCausalLM.from_pretrained(tmp_path / name).config.peer["num_experts"] for name in "ab"]
    assert sizes == [row["experts_after"], 16]
    windows = text_windows(open_tokenizer(model), [text], context=256)
    before, after = (PeerForCausalLM.from_pretrained(each).eval() for each in (model, tmp_path / "a"))
    with torch.no_grad():
        found, plain = after(windows).logits, before(windows).logits
        with float64():
            exact = definition(before)(windows).logits
    assert_within_budget(found, plain, exact)
    for options, named in (
        (["--num-experts=900"], "num_experts is 900, but layer 'model.layers.0.ffw' has 400; give a smaller square"),
        (["--num-experts=5"], "which is not a square number"),
    ):
        assert run("shrink", model, tmp_path / "new", "--text", text, *options) == 2
        assert named in capfd.readouterr().err
    assert run("shrink", model, tmp_path / "a", "--text", text) == 2
    assert "a exists already; name a new folder" in capfd.readouterr().err


@pytest.mark.parametrize("keys", ["crowded", "data"])
def test_a_folder_grows_where_a_text_has_its_queries(keys: str, readable: tuple[Path, Path], tmp_path: Path) -> None:
    model, text = readable
    assert run("grow", model, tmp_path / "a", "--num-experts=900", "--keys", keys, "--text", text) == 0
    assert run("grow", model, tmp_path / "b", "--num-experts=900") == 0
    name = "model.layers.0.ffw.product_keys.sub_keys"
    a, b = (load_file(tmp_path / each / "model.safetensors")[name] for each in "ab")
    assert torch.equal(a[:, :, :20], b[:, :, :20])
    assert not torch.allclose(a[:, :, 20:], b[:, :, 20:])


def test_text_that_random_keys_would_not_read_is_refused(
    readable: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, text = readable
    assert run("grow", model, tmp_path / "new", "--num-experts=900", "--text", text) == 2
    assert "--keys random reads no text; leave --text out" in capfd.readouterr().err
    assert not (tmp_path / "new").exists()


def test_text_begins_as_the_models_documents_do(
    readable: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peerlm.growth.folder as module

    _, text = readable
    tokenizer = train_tokenizer([text.read_text()], vocab_size=300)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "peer"}')
    seen: dict[str, list[int]] = {}
    for start in ("auto", "<|endoftext|>"):
        monkeypatch.setattr(
            module,
            "shrink_folder",
            lambda folder, output, number, samples, start=start: (
                seen.update({start: [window[0].item() for batch in samples for window in batch["input_ids"]]})
                or {"layers": []}
            ),
        )
        assert run("shrink", tmp_path, tmp_path / "out", "--text", text, f"--document-start={start}", "--json=-") == 0
    assert set(seen["auto"]) == {tokenizer.bos_token_id}
    assert len(set(seen["<|endoftext|>"])) > 1  # one end-of-text token, before the first window
