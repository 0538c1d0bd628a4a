"""Users' mistakes, through the real command line: one sentence, exit code 2, nothing lost."""

import hashlib
import json
import lzma
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from peerlm.cli import main

RECIPE = """
run = "{folder}/run"
[data]
folder = "{folder}/tokens"
context = 8
batch_size = 2
[model]
hidden_size = 8
num_hidden_layers = 1
num_attention_heads = 1
max_position_embeddings = 16
ffw_layers = "peer"
peer = {{ num_experts = 16, heads = 1, experts_per_head = 2, key_dim = 4 }}
[budget]
steps = 2
[checkpoint]
every = 1
"""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prepared tokens, a finished run, and files to make mistakes with."""
    folder = tmp_path_factory.mktemp("bad")
    documents = [f"Document {number} tells of {number * number} ships and one sea." for number in range(60)]
    (folder / "books.txt").write_text("\n<|endoftext|>\n".join(documents))
    (folder / "recipe.toml").write_text(RECIPE.format(folder=folder))
    for command in (
        ["prepare", f"{folder}/books.txt", "--output", f"{folder}/tokens", "--vocab-size", "300", "--json"],
        ["train", f"{folder}/recipe.toml", "--json"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code in (None, 0)
    (folder / "empty.txt").touch()
    (folder / "binary.txt").write_bytes(b"\x7fELF\x00\x01\x02" * 9)
    (folder / "latin.txt").write_bytes("caf\u00e9".encode("latin-1") * 9)
    (folder / "one.txt").write_text("one document and no other")
    (folder / "broken.jsonl").write_text('{"text": "good"}\n{"text": \n')
    (folder / "fields.jsonl").write_text('{"text": "good"}\n{"body": "x"}\n')
    (folder / "number.jsonl").write_text('{"text": 3}\n')
    (folder / "picture.png").write_bytes(b"png")
    (folder / "cut.txt.xz").write_bytes(lzma.compress(b"a long text " * 999)[:-20])
    (folder / "nothing").mkdir()
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("do not overwrite")
    pq.write_table(pa.table({"body": ["x", "y"]}), folder / "rows.parquet")
    (folder / "broken.toml").write_text("run = [")
    (folder / "bare.toml").write_text(RECIPE.split("[model]")[0].format(folder=folder))
    methods = '[methods.dense.model]\nffw_layers = "dense"\n'
    (folder / "compare.toml").write_text(RECIPE.format(folder=folder).replace("/run", "/out") + methods)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "work"
    shutil.copytree(original, copy)
    for path in (*copy.glob("*.toml"), copy / "run" / "config.json"):
        path.write_text(path.read_text().replace(str(original), str(copy)))
    return copy


def prepare(folder: Path, source: str, *more: str) -> list[str]:
    return ["prepare", f"{folder}/{source}", "--output", f"{folder}/new", "--vocab-size", "300", *more]


def train(folder: Path, *settings: str, run: str = "run2") -> list[str]:
    return ["train", f"{folder}/recipe.toml", "--output", f"{folder}/{run}", *(f"--set={s}" for s in settings)]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def a_shard(folder: Path) -> Path:
    return folder / "tokens" / "train-00000.bin"


def newest_checkpoint(folder: Path) -> Path:
    return max((folder / "run" / "checkpoints").glob("step-*"))


def resume_unfinished(folder: Path) -> list[str]:
    (folder / "run" / "summary.json").unlink()
    return ["train", f"{folder}/run/config.json", "--resume"]


def damaged(damage: Callable[[Path], object], command: Callable[[Path], list[str]]) -> Callable[[Path], list[str]]:
    def build(folder: Path) -> list[str]:
        damage(folder)
        return command(folder)

    return build


MISTAKES: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    # preparing data
    "source missing": (lambda f: prepare(f, "none.txt"), "none.txt"),
    "source empty": (lambda f: prepare(f, "empty.txt"), "empty.txt"),
    "source binary": (lambda f: prepare(f, "binary.txt"), "binary.txt"),
    "source not UTF-8": (lambda f: prepare(f, "latin.txt"), "latin.txt"),
    "source cut short": (lambda f: prepare(f, "cut.txt.xz"), "cut.txt.xz"),
    "suffix unknown": (lambda f: prepare(f, "picture.png"), "picture.png"),
    "name not UTF-8": (
        damaged(
            lambda f: shutil.copy(f / "books.txt", os.fsencode(f / "mine") + b"/caf\xe9.txt"),
            lambda f: prepare(f, "mine"),
        ),
        "caf\\xe9.txt",
    ),
    "link to nothing": (
        damaged(lambda f: (f / "mine" / "more").symlink_to("../gone"), lambda f: prepare(f, "mine")),
        "../gone",
    ),
    "source is a pipe": (damaged(lambda f: os.mkfifo(f / "p.txt"), lambda f: prepare(f, "p.txt")), "p.txt"),
    "folder empty": (lambda f: prepare(f, "nothing"), "nothing"),
    "JSONL line broken": (lambda f: prepare(f, "broken.jsonl"), "broken.jsonl:2:"),
    "JSONL field missing": (lambda f: prepare(f, "fields.jsonl"), "fields.jsonl:2:"),
    "JSONL field no text": (lambda f: prepare(f, "number.jsonl"), "number.jsonl:1:"),
    "parquet column missing": (lambda f: prepare(f, "rows.parquet"), "body"),
    "one document": (lambda f: prepare(f, "one.txt"), "document"),
    "vocabulary too small": (lambda f: prepare(f, "books.txt", "--vocab-size", "100"), "100"),
    "holdout too large": (lambda f: prepare(f, "books.txt", "--holdout", "1.5"), "1.5"),
    "tokenizer missing": (lambda f: prepare(f, "books.txt", "--tokenizer", f"{f}/none"), "none"),
    "output not ours": (lambda f: prepare(f, "books.txt", "--output", f"{f}/mine"), "mine"),
    "output of another request": (
        lambda f: prepare(f, "books.txt", "--output", f"{f}/tokens", "--seed", "9"),
        "tokens",
    ),
    # recipes
    "recipe missing": (lambda f: ["train", f"{f}/none.toml"], "none.toml"),
    "recipe broken": (lambda f: ["train", f"{f}/broken.toml"], "broken.toml"),
    "recipe without budget": (lambda f: ["train", f"{f}/bare.toml"], "budget"),
    "key unknown": (lambda f: train(f, "optim.learning_rat=1"), "did you mean 'optim.learning_rate'"),
    "section unknown": (lambda f: train(f, "modle.hidden_size=8"), "did you mean 'model'"),
    "value of the wrong type": (lambda f: train(f, "data.batch_size=two"), "expected an integer"),
    "value without sense": (lambda f: train(f, "optim.learning_rate=-1"), "optim.learning_rate = -1"),
    "setting without value": (lambda f: train(f, "optim.learning_rate"), "section.key=value"),
    "experts no square": (lambda f: train(f, "model.peer.num_experts=15"), "the nearest is 16"),
    "experts written as a float": (lambda f: train(f, "model.peer.num_experts=1e6"), "whole number"),
    "more retrieved than sub-keys": (lambda f: train(f, "model.peer.experts_per_head=5"), "experts_per_head <= 4"),
    "layer setting unknown": (lambda f: train(f, "model.peer.head=2"), "did you mean 'heads'"),
    "kind of layer unknown": (lambda f: train(f, "model.ffw_layers=moe"), "choose from dense"),
    "budget too small": (lambda f: train(f, "budget.flops=1"), "budget"),
    # data and runs on the disk
    "tokens missing": (lambda f: train(f, f"data.folder={f}/none"), "none"),
    "shard cut": (damaged(lambda f: cut(a_shard(f)), train), "train-00000.bin"),
    "shard missing": (damaged(lambda f: a_shard(f).unlink(), train), "train-00000.bin"),
    "manifest broken": (damaged(lambda f: cut(f / "tokens" / "manifest.json"), train), "manifest.json"),
    "tokenizer of other shards": (
        damaged(lambda f: edit(f / "tokens" / "tokenizer" / "tokenizer.json", version="0"), train),
        "tokenizer",
    ),
    "run exists": (lambda f: train(f, run="run"), "--resume"),
    "resume without run": (lambda f: [*train(f), "--resume"], "run2"),
    "resume with another seed": (lambda f: [*train(f, "seed=5", run="run"), "--resume"], "seed was 0, now 5"),
    "checkpoint weights cut": (
        damaged(lambda f: cut(newest_checkpoint(f) / "model.safetensors"), resume_unfinished),
        "step-00000002",
    ),
    "checkpoint state broken": (
        damaged(lambda f: cut(newest_checkpoint(f) / "state.json"), resume_unfinished),
        "step-00000002",
    ),
    # evaluation and text
    "no run": (lambda f: ["eval", f"{f}/mine", f"{f}/books.txt"], "mine"),
    "evaluation file missing": (lambda f: ["eval", f"{f}/run", f"{f}/none.txt"], "none.txt"),
    "evaluation file empty": (lambda f: ["eval", f"{f}/run", f"{f}/empty.txt"], "empty.txt"),
    "evaluation fields missing": (lambda f: ["eval", f"{f}/run", f"{f}/fields.jsonl"], "fields.jsonl:2:"),
    "stride over context": (lambda f: ["eval", f"{f}/run", f"{f}/books.txt", "--context=8", "--stride=9"], "stride"),
    "context over the model's": (lambda f: ["eval", f"{f}/run", f"{f}/books.txt", "--context=64"], "64"),
    "model cut": (
        damaged(lambda f: cut(f / "run/model/model.safetensors"), lambda f: ["eval", f"{f}/run", f"{f}/books.txt"]),
        "model",
    ),
    "generate without run": (lambda f: ["generate", f"{f}/none", "Once"], "none"),
    # comparison
    "nothing to compare": (lambda f: ["compare", f"{f}/recipe.toml"], "compares nothing"),
    "compare unknown key": (lambda f: ["compare", f"{f}/compare.toml", "--set", "compare.seed=[1]"], "compare.seeds"),
    "compare without seeds": (lambda f: ["compare", f"{f}/compare.toml", "--set", "compare.seeds=[]"], "compare.seeds"),
    "compare on a missing file": (
        lambda f: ["compare", f"{f}/compare.toml", "--set", 'compare.evaluate=["none.txt"]'],
        "none.txt",
    ),
}


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_loses_nothing(
    name: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    build, named = MISTAKES[name]
    command = build(folder)
    before = contents(folder)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(command)
    stderr = capfd.readouterr().err
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2, stderr
    assert len(errors) == 1, stderr
    assert stderr.splitlines()[-1] == errors[0]
    assert named in errors[0]
    assert "Traceback" not in stderr
    after = contents(folder)
    assert {path: after.get(path) for path in before} == before


def test_there_are_thirty_mistakes_and_more() -> None:
    assert len(MISTAKES) >= 30
