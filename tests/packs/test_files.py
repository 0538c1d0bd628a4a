"""A pack's folder: killed while it is written, damaged, or of another model; and the command line."""

import hashlib
import itertools
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from peerlm.data.tokenizer import END_OF_TEXT
from peerlm.errors import UserError
from peerlm.evaluate import evaluate, load_model
from peerlm.layers import PEER
from peerlm.packs.api import load_pack, loaded_packs, new_pack, pack_parameters, read_pack, save_pack
from peerlm.packs.files import read_manifest

from ..models import contents, run

SIZES = {"num_experts": 16, "heads": 2, "experts_per_head": 2, "key_dim": 4}
X = torch.linspace(-1, 1, 40).view(5, 8)


def small_layer(seed: int = 0, **changes: Any) -> PEER:
    torch.manual_seed(seed)
    return PEER(8, **SIZES | changes).eval()


def with_pack(size: int = 9, value: float = 1.0) -> PEER:
    layer = small_layer()
    new_pack(layer, "law", size)
    with torch.no_grad():
        pack_parameters(layer, "law")[1].fill_(value)
    return layer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pack."""
    save_pack(with_pack(), "law", tmp_path / "law", licence="CC0-1.0", data="laws", metrics={"perplexity": 3.5})
    return tmp_path / "law"


def output_with(folder: Path) -> Tensor:
    layer = small_layer()
    load_pack(layer, folder)
    return layer(X)


def test_the_manifest_says_what_the_pack_is(folder: Path) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    (weights,) = folder.glob("*.safetensors")
    assert values.pop("base") == read_manifest(folder).base
    assert values == {
        "format": "peerlm pack",
        "version": 1,
        "name": "law",
        "architecture": "PEER",
        "layers": {"": 9},
        "dtype": "float32",
        "parameters": 2 * 3 * 2 + 9 * 2 * 8,
        "licence": "CC0-1.0",
        "data": "laws",
        "metrics": {"perplexity": 3.5},
        "weights": weights.name,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    assert {name: tensor.shape for name, tensor in load_file(weights).items()} == {
        "sub_keys": (2, 1, 3, 2),
        "rows": (9, 2, 8),
    }


def test_saving_again_replaces_and_leaves_nothing(folder: Path) -> None:
    layer = with_pack(16, value=2.0)
    (folder / ".partial-pack-0123456789abcdef.safetensors").write_text("of a killed process")
    save_pack(layer, "law", folder)
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors"]
    assert torch.equal(output_with(folder), layer(X))


def test_wherever_a_save_stops_the_old_pack_or_the_new_one_is_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, layer = output_with(folder), with_pack(16, value=2.0)
    new, before = layer(X), contents(folder)
    outcomes = []
    for stop in range(100):
        calls = 0

        def counting(function: Callable[..., Any]) -> Callable[..., Any]:
            def count(*arguments: Any, **options: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls > stop:  # noqa: B023, it is called within the turn
                    raise KeyboardInterrupt
                return function(*arguments, **options)

            return count

        with monkeypatch.context() as patch:
            for name in ("replace", "unlink", "write_bytes", "mkdir"):
                patch.setattr(Path, name, counting(getattr(Path, name)))
            patch.setattr(os, "fsync", counting(os.fsync))
            try:
                save_pack(layer, "law", folder)
                stopped = False
            except KeyboardInterrupt:
                stopped = True
        found = output_with(folder)
        outcomes.append(torch.equal(found, new))
        assert outcomes[-1] or torch.equal(found, old)
        if not stopped:
            break
        if outcomes[-1]:  # put the old one back
            save_pack(with_pack(), "law", folder, licence="CC0-1.0", data="laws", metrics={"perplexity": 3.5})
            assert contents(folder) == before
    assert outcomes[0] is False
    assert outcomes[-1] is True
    assert len(outcomes) > 6


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_save_killed_at_any_moment_leaves_a_pack(tmp_path: Path) -> None:
    folder, layer = tmp_path / "law", with_pack(40 * 40)
    save_pack(layer, "law", folder, metrics={"turn": 1})
    moments = random.Random(0)
    for _ in range(12):
        began = read_manifest(folder).metrics["turn"]  # type: ignore[index]
        child = os.fork()
        if not child:
            for turn in itertools.count(began):
                pack_parameters(layer, "law")[1].data.fill_(turn)
                save_pack(layer, "law", folder, metrics={"turn": turn})
        while read_manifest(folder).metrics["turn"] < began + 2:  # type: ignore[index]
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        loaded = small_layer()
        load_pack(loaded, folder)
        assert (pack_parameters(loaded, "law")[1] == read_manifest(folder).metrics["turn"]).all()  # type: ignore[index]


def edited(folder: Path, **changes: Any) -> None:
    """Change the manifest."""
    path = folder / "manifest.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not KeyError}))


def retensored(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors, with the right hash."""
    manifest = read_manifest(folder)
    tensors = load_file(folder / manifest.weights)
    change(tensors)
    content = save(tensors)
    (folder / manifest.weights).write_bytes(content)
    edited(folder, sha256=hashlib.sha256(content).hexdigest())


def weights_of(folder: Path) -> Path:
    return folder / read_manifest(folder).weights


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda f: [path.unlink() for path in f.iterdir()], "law is no pack: it has no manifest.json; name a"),
    "not JSON": (
        lambda f: (f / "manifest.json").write_text("{"),
        "manifest.json is damaged .it is no JSON object.; re",
    ),
    "nested": (lambda f: (f / "manifest.json").write_text("[" * 10**5), "is damaged .it is no JSON object"),
    "a list": (lambda f: (f / "manifest.json").write_text("[]"), "is damaged .it is no JSON object"),
    "another's": (lambda f: (f / "manifest.json").write_text("{}"), "is not that of a pack; name a folder that save_p"),
    "newer": (lambda f: edited(f, version=3), "has version 3, and this peerlm reads 2; install a newer peerlm"),
    "a field less": (lambda f: edited(f, base=KeyError), "is damaged .*missing 1 required .*'base'"),
    "a field more": (lambda f: edited(f, extra=1), "is damaged .*unexpected keyword argument 'extra'"),
    "its name": (lambda f: edited(f, name="../x"), "is damaged .a pack cannot be called '../x'"),
    "its base": (lambda f: edited(f, base=3), "is damaged .base is 3"),
    "its layers": (lambda f: edited(f, layers={"": 8}), "is damaged .layers have 8 experts"),
    "no layers": (lambda f: edited(f, layers={}), "is damaged .layers is {}"),
    "a path": (lambda f: edited(f, weights="../pack-0123456789abcdef.safetensors"), "is damaged .weights is '../pack"),
    "a pickle": (lambda f: edited(f, weights="pack.bin"), "is damaged .weights is 'pack.bin'"),
    "no weights": (lambda f: weights_of(f).unlink(), "safetensors cannot be read .No such file or directory.; restore"),
    "cut short": (
        lambda f: weights_of(f).write_bytes(weights_of(f).read_bytes()[:-7]),
        "safetensors is damaged .its hash is not the one in the manifest.; restore the pack, or save it again",
    ),
    "no safetensors": (
        lambda f: (weights_of(f).write_bytes(b"x"), edited(f, sha256=hashlib.sha256(b"x").hexdigest())),
        "safetensors is damaged .*[Hh]eader",
    ),
    "other base": (
        lambda f: edited(f, base="0" * 64),
        "made for the model 000000000000, a PEER; this one is [0-9a-f]{12}:",
    ),
    "other layer": (
        lambda f: edited(f, layers={"x.y": 9}),
        "has experts for 'x.y', which is no PEER layer of the model",
    ),
    "fewer tensors": (
        lambda f: retensored(f, lambda t: t.pop("rows")),
        r"lacks the rows of '', \(9, 2, 8\) finite num",
    ),
    "more tensors": (lambda f: retensored(f, lambda t: t.update(x=X)), "has unknown tensors, such as 'x'; restore it"),
    "other shape": (lambda f: edited(f, layers={"": 16}), r"lacks the sub_keys of '', \(2, 1, 4, 2\) finite numbers"),
    "not numbers": (lambda f: retensored(f, lambda t: t["rows"].fill_(torch.nan)), "lacks the rows of ''"),
    "integers": (lambda f: retensored(f, lambda t: t.update(rows=t["rows"].long())), "lacks the rows of ''"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_pack_is_one_sentence_and_changes_nothing(
    folder: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(folder)
    layer = small_layer()
    before = layer(X)
    with pytest.raises(UserError, match=message) as error:
        load_pack(layer, folder)
    assert "\n" not in str(error.value)
    assert loaded_packs(layer) == []
    assert torch.equal(layer(X), before)


def test_another_model_is_refused(folder: Path) -> None:
    for other in (small_layer(1), small_layer(weighting="sigmoid"), small_layer(row_format="int8")):
        with pytest.raises(UserError, match=": load that model in the same format, or train a new pack"):
            load_pack(other, folder)


def test_a_name_that_is_taken(folder: Path) -> None:
    layer = with_pack()
    with pytest.raises(ValueError, match="a pack 'law' is loaded already"):
        load_pack(layer, folder)
    with pytest.raises(ValueError, match="a pack cannot be called 'a/b'"):
        load_pack(layer, folder, "a/b")
    assert load_pack(layer, folder, "law-2") == "law-2"


def test_a_pack_that_was_read_is_there_once_it_is_put_there(folder: Path) -> None:
    layer, other = small_layer(), small_layer()
    first, second = read_pack(layer, folder), read_pack(layer, folder)
    assert loaded_packs(layer) == []
    load_pack(other, folder)
    assert first() == "law"
    assert torch.equal(layer(X), other(X))
    with pytest.raises(ValueError, match="a pack 'law' is loaded already"):
        second()


@pytest.mark.parametrize("options", [{"data": {1, 2}}, {"metrics": {"loss": float("nan")}}, {"licence": b"x"}], ids=str)
def test_what_json_cannot_say_is_not_written(folder: Path, options: dict[str, Any]) -> None:
    before = contents(folder)
    with pytest.raises(ValueError, match="licence, data and metrics are written as JSON, which cannot be done"):
        save_pack(with_pack(value=2.0), "law", folder, **options)
    assert contents(folder) == before


def test_folders_of_others_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text('{"documents": 3}')
    before = contents(tmp_path)
    for target in (tmp_path, tmp_path / "file", tmp_path / "data"):
        with pytest.raises(UserError, match="is there, and is no pack; name a new folder"):
            save_pack(with_pack(), "law", target)
    assert contents(tmp_path) == before


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with a tokenizer, a pack of it, and a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from peerlm.model import PeerConfig, PeerForCausalLM

    folder = tmp_path_factory.mktemp("saved")
    words = [END_OF_TEXT, "unknown", *"abcdefghijkl"]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="unknown"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END_OF_TEXT).save_pretrained(folder / "model")
    config = {"vocab_size": len(words), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name, kind in (("model", "peer"), ("dense", "dense")):
        torch.manual_seed(0)
        model = PeerForCausalLM(PeerConfig(**config, ffw_layers=kind, peer=SIZES))
        model.save_pretrained(folder / name)
        (folder / "dense").mkdir(exist_ok=True)
    for path in (folder / "model").glob("tokenizer*"):
        (folder / "dense" / path.name).write_bytes(path.read_bytes())
    model, _ = load_model(folder / "model")
    new_pack(model, "law", 9)
    for parameter in pack_parameters(model, "law"):
        torch.nn.init.normal_(parameter, std=3.0)
    save_pack(model, "law", folder / "law", licence="CC0-1.0", data={"files": ["a.txt", "b.txt"]})
    (folder / "text.txt").write_text("a b c d e f g h i j k l " * 20)
    return folder


def test_inspect_shows_the_manifest(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("pack", "inspect", saved / "law", "--json=-", "--for", saved / "model") == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts.pop("fits") == str(saved / "model")
    assert (facts.pop("settings"), facts.pop("first")) == (None, None)
    assert facts == {
        key: value
        for key, value in json.loads((saved / "law" / "manifest.json").read_text()).items()
        if key not in ("format", "version")
    }
    assert run("pack", "inspect", saved / "law") == 0
    out = capfd.readouterr().out
    for text in ("licence", "CC0-1.0", "a.txt, b.txt", "model.layers.0.ffw: 9"):
        assert text in out


def test_inspect_of_no_pack_and_of_another_model(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("pack", "inspect", saved / "model") == 2
    assert "is no pack: it has no manifest.json" in capfd.readouterr().err
    assert run("pack", "inspect", saved / "law", "--for", saved / "dense") == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: the pack in")


@pytest.mark.filterwarnings("ignore:the tokenizer does not keep:peerlm.errors.PeerlmWarning")
def test_eval_and_generate_with_a_pack(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = saved / "text.txt"
    plain = evaluate(saved / "model", [text], context=16, progress=False)[str(text)]
    assert run("eval", saved / "model", text, "--context=16", "--json=-", "--pack", saved / "law") == 0
    packed = json.loads(capfd.readouterr().out)[str(text)]
    assert packed["perplexity"] != plain["perplexity"]
    assert len(packed["usage"]) == len(plain["usage"]) == 1
    texts = []
    for options in ([], ["--pack", saved / "law"]):
        assert run("generate", saved / "model", "a b", "--tokens=20", "--temperature=2", *options) == 0
        texts.append(capfd.readouterr().out)
    assert texts[0] != texts[1]
    assert run("generate", saved / "model", "a", "--pack", saved / "law", "--pack", saved / "law") == 2
    assert "a pack 'law' is loaded already" in capfd.readouterr().err
