"""Token files of Megatron-LM, datatrove and Hugging Face, written by other hands, read in place and trained on."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from peerlm import UserError
from peerlm.cli import main
from peerlm.data import TokenShards, open_shards
from peerlm.data.tokenizer import train_tokenizer
from peerlm.train import train
from peerlm.train.config import TrainConfig
from peerlm.train.recipe import from_dict

EOS = 0
DOCUMENTS = [[int(n) for n in np.random.default_rng(i).integers(1, 270, 5 + 7 * i % 40)] + [EOS] for i in range(40)]
TOKENS = [token for document in DOCUMENTS for token in document]
ENDS = np.cumsum([len(document) for document in DOCUMENTS])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["the cat sat on the mat and saw a small bird eat peas in the rain"] * 3, 270).save_pretrained(
        folder
    )
    return folder


def write_megatron(path: Path, documents: list[list[int]], dtype: str = "<u2", code: int = 8, cut: int = 3) -> Path:
    """As Megatron-LM's preprocessing does: documents of one sequence, the first of which here has `cut` sequences."""
    head = [documents[0][:1], documents[0][1:2], documents[0][2:]][:cut] if cut == 3 else [documents[0]]
    sequences = [*head, *documents[1:]]
    path.write_bytes(b"".join(np.array(each, dtype).tobytes() for each in sequences))
    lengths = np.array([len(each) for each in sequences], "<i4")
    pointers = np.r_[0, np.cumsum(lengths.astype(np.int64))[:-1]] * np.dtype(dtype).itemsize
    bounds = np.r_[0, np.arange(len(head), len(sequences) + 1)].astype("<i8")
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(bounds))
    path.with_suffix(".idx").write_bytes(
        header + lengths.tobytes() + pointers.astype("<i8").tobytes() + bounds.tobytes()
    )
    return path


def write_datatrove(path: Path, documents: list[list[int]], size: int = 2) -> Path:
    tokens = [token for document in documents for token in document]
    path.write_bytes(struct.pack(f"<{len(tokens)}{'H' if size == 2 else 'I'}", *tokens))
    ends = np.cumsum([len(document) for document in documents])
    Path(f"{path}.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    Path(f"{path}.metadata").write_text(f"gpt2|{size}\n{len(tokens)}\n{len(tokens)} T")
    return path


def data_set(documents: list[list[int]], **features: str) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"input_ids": documents, "n": [1] * len(documents)}).cast_column(
        "input_ids", datasets.List(datasets.Value(features.get("of", "int32")))
    )


def write_data_set(path: Path, documents: list[list[int]], **options: Any) -> Path:
    data_set(documents, **options).save_to_disk(path, num_shards=3, num_proc=None)
    return path


def write_parquet(path: Path, documents: list[list[int]]) -> Path:
    data_set(documents).to_parquet(path, batch_size=7)
    return path


WRITERS: dict[str, Callable[[Path], Path]] = {
    "Megatron-LM": lambda folder: write_megatron(folder / "a.bin", DOCUMENTS),
    "Megatron-LM, by its prefix": lambda folder: write_megatron(folder / "a.bin", DOCUMENTS).with_suffix(""),
    "Megatron-LM, int32": lambda folder: write_megatron(folder / "a.bin", DOCUMENTS, "<i4", 4),
    "Megatron-LM, int64": lambda folder: write_megatron(folder / "a.bin", DOCUMENTS, "<i8", 5, cut=1),
    "datatrove": lambda folder: write_datatrove(folder / "a.ds", DOCUMENTS),
    "datatrove, uint32": lambda folder: write_datatrove(folder / "a.ds", DOCUMENTS, 4),
    "data set": lambda folder: write_data_set(folder / "a", DOCUMENTS),
    "data set, int64": lambda folder: write_data_set(folder / "a", DOCUMENTS, of="int64"),
    "parquet": lambda folder: write_parquet(folder / "a.parquet", DOCUMENTS),
}


def recipe(folder: Path, run: Path) -> TrainConfig:
    model = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "peer": {"num_experts": 256}}
    values = {"run": str(run), "data": {"folder": str(folder), "context": 8, "batch_size": 4}, "model": model}
    return from_dict(TrainConfig, values | {"budget": {"steps": 3}, "eval": {"final_windows": 2}})


@pytest.mark.filterwarnings("ignore:.*multi-threaded")
@pytest.mark.parametrize("kind", WRITERS)
def test_tokens_and_document_ends_are_those_that_were_written(kind: str, tokenizer: Path, tmp_path: Path) -> None:
    source = WRITERS[kind](tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    manifest = open_shards([source], tmp_path / "out", tokenizer=tokenizer, holdout=0.2, progress=False)
    assert {path: path.read_bytes() for path in files} == files
    if kind != "parquet":
        assert not list((tmp_path / "out").glob("copied-*"))
    shards, heldout = (TokenShards(tmp_path / "out", split, verify=True) for split in ("train", "heldout"))
    cut = shards.num_tokens
    assert shards.tokens(0, cut).tolist() + heldout.tokens(0, heldout.num_tokens).tolist() == TOKENS
    assert [*shards.document_ends, *(heldout.document_ends + np.uint64(cut))] == ENDS.tolist()
    assert 0.2 <= heldout.num_tokens / len(TOKENS) < 0.25
    assert shards.tokens(3, 60).tolist() == TOKENS[3:60]
    assert shards.tokens(0, 1).dtype == np.uint16
    assert manifest.vocab_size == shards.vocab_size == 270
    assert open_shards([source], tmp_path / "out", tokenizer=tokenizer, holdout=0.2, progress=False) == manifest
    result = train(recipe(tmp_path / "out", tmp_path / "run"), progress=False)
    assert result.summary["validation_loss"] > 0


def test_sources_follow_one_another_and_the_held_out_ones_are_named(tokenizer: Path, tmp_path: Path) -> None:
    for number in (2, 0, 1):
        write_datatrove(tmp_path / f"{number}.ds", DOCUMENTS[number::3])
    other = write_megatron(tmp_path / "other.bin", DOCUMENTS[:4])
    folder = tmp_path / "all"
    folder.mkdir()
    for path in tmp_path.glob("?.ds*"):
        path.rename(folder / path.name)
    open_shards([folder], tmp_path / "out", tokenizer=tokenizer, heldout=[other], progress=False)
    shards, heldout = (TokenShards(tmp_path / "out", split) for split in ("train", "heldout"))
    expected = [token for number in range(3) for document in DOCUMENTS[number::3] for token in document]
    assert shards.tokens(0, shards.num_tokens).tolist() == expected
    assert heldout.document_ends.tolist() == ENDS[:4].tolist()


def test_sequences_that_megatron_lm_keeps_out_of_order(tokenizer: Path, tmp_path: Path) -> None:
    path = write_megatron(tmp_path / "a.bin", DOCUMENTS, cut=1)
    index = path.with_suffix(".idx")
    data, count = index.read_bytes(), len(DOCUMENTS)
    lengths, pointers = np.frombuffer(data, "<i4", count, 34), np.frombuffer(data, "<i8", count, 34 + 4 * count)
    order = np.r_[5, 0:5, 6:count]
    index.write_bytes(data[:34] + lengths[order].tobytes() + pointers[order].tobytes() + data[34 + 12 * count :])
    open_shards([path], tmp_path / "out", tokenizer=tokenizer, progress=False)
    shards = TokenShards(tmp_path / "out", "train")
    expected = [token for at in order for token in DOCUMENTS[at]]
    assert shards.tokens(0, shards.num_tokens).tolist() == expected[: shards.num_tokens]


def damage(path: Path, change: Callable[[bytes], bytes]) -> Path:
    path.write_bytes(change(path.read_bytes()))
    return path


def megatron(folder: Path, change: Callable[[bytes], bytes]) -> Path:
    path = write_megatron(folder / "a.bin", DOCUMENTS)
    damage(path.with_suffix(".idx"), change)
    return path


def datatrove(folder: Path, suffix: str, change: Callable[[bytes], bytes]) -> Path:
    path = write_datatrove(folder / "a.ds", DOCUMENTS)
    damage(Path(f"{path}{suffix}"), change)
    return path


def removed(path: Path, name: str) -> Path:
    path.with_name(name).unlink()
    return path


def split_folder(folder: Path) -> Path:
    datasets.DatasetDict({"test": data_set(DOCUMENTS), "train": data_set(DOCUMENTS)}).save_to_disk(folder / "both")
    return folder / "both"


def text_column(folder: Path) -> Path:
    datasets.Dataset.from_dict({"input_ids": ["a", "b"]}).save_to_disk(folder / "text")
    return folder / "text"


WRONG: dict[str, tuple[Callable[[Path], Path], str]] = {
    "Megatron-LM without index": (
        lambda f: removed(write_megatron(f / "a.bin", DOCUMENTS), "a.idx"),
        r"a\.bin has no index a\.idx beside it",
    ),
    "another file": (lambda f: megatron(f, lambda data: b"x" + data), "is no index of Megatron-LM"),
    "header cut off": (lambda f: megatron(f, lambda data: data[:20]), "is cut off within its header, at 20 bytes"),
    "index cut off": (lambda f: megatron(f, lambda data: data[:-1]), r"a\.idx has \d+ bytes, and 42 sequences take"),
    "version": (lambda f: megatron(f, lambda data: data[:9] + b"\x02" + data[10:]), "has version 2, and version 1"),
    "floats": (lambda f: megatron(f, lambda data: data[:17] + b"\x07" + data[18:]), "tokens have type 7, which is no"),
    "other documents": (lambda f: megatron(f, lambda data: data[:-8] + bytes(8)), "has documents that are not its 42"),
    "tokens cut off": (
        lambda f: damage(write_megatron(f / "a.bin", DOCUMENTS), lambda data: data[:-2]),
        r"a\.bin has \d+ bytes, not the \d+ that a\.idx says",
    ),
    "datatrove without index": (
        lambda f: removed(write_datatrove(f / "a.ds", DOCUMENTS), "a.ds.index"),
        r"a\.ds has no index a\.ds\.index beside it",
    ),
    "datatrove cut off": (lambda f: datatrove(f, "", lambda data: data[:-2]), "not 2 or 4 for each of its index's"),
    "datatrove's index": (
        lambda f: datatrove(f, ".index", lambda data: data[8:] + data[:8]),
        "is no index of datatrove",
    ),
    "datatrove's size": (
        lambda f: datatrove(f, ".metadata", lambda data: data.replace(b"|2", b"|4")),
        r"says that tokens have 4 bytes, and in a\.ds they have 2",
    ),
    "datatrove's count": (
        lambda f: datatrove(f, ".metadata", lambda data: b"gpt2|2\n7\n7 T"),
        r"a\.ds\.metadata counts 7 tokens, and a\.ds\.index",
    ),
    "several splits": (split_folder, "both holds the splits test, train: name one of them, as in .*both/test"),
    "text": (text_column, "column 'input_ids' holds string, not lists of ids: name another by --field"),
    "no such column": (
        lambda f: write_data_set(f / "a", DOCUMENTS),
        "has no column 'tokens', but input_ids, n: name one of token ids by --field",
    ),
    "state damaged": (
        lambda f: damage(write_data_set(f / "a", DOCUMENTS) / "state.json", lambda data: b"{}").parent,
        "state.json is damaged",
    ),
    "Arrow cut off": (
        lambda f: damage(next(write_data_set(f / "a", DOCUMENTS).glob("*.arrow")), lambda data: data[:300]).parent,
        "is no Arrow file that can be read",
    ),
    "parquet cut off": (
        lambda f: damage(write_parquet(f / "a.parquet", DOCUMENTS), lambda data: data[:200]),
        "not a parquet file, or one that is cut off",
    ),
    "unknown kind": (lambda f: damage_free(f / "a.txt"), "is of an unknown kind: name Megatron-LM's .bin"),
    "missing": (lambda f: f / "none.ds", "none.ds does not exist"),
    "one document": (lambda f: write_datatrove(f / "a.ds", DOCUMENTS[:1]), "of which nothing can be held out"),
    "a token too many": (
        lambda f: write_datatrove(f / "a.ds", [*DOCUMENTS, [5, 270]]),
        r"a\.ds has token 270 at place \d+ of a part, and the tokenizer has 270 tokens",
    ),
    "a negative token": (
        lambda f: write_megatron(f / "a.bin", [*DOCUMENTS, [5, -1]], "<i4", 4),
        "has token -1 at place",
    ),
    "a token too many, in parquet": (
        lambda f: write_parquet(f / "a.parquet", [*DOCUMENTS, [65536 + 5]]),
        r"a\.parquet has token 65541 at place",
    ),
}


def damage_free(path: Path) -> Path:
    path.write_text("text")
    return path


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_one_sentence_and_leaves_nothing(case: str, tokenizer: Path, tmp_path: Path) -> None:
    make, message = WRONG[case]
    source = make(tmp_path)
    field = "tokens" if case == "no such column" else "input_ids"
    with pytest.raises(UserError, match=message):
        open_shards([source], tmp_path / "out", tokenizer=tokenizer, field=field, progress=False)
    assert not list(tmp_path.glob("out*"))


def test_documents_without_a_mark_at_their_end_are_said(
    tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_datatrove(tmp_path / "a.ds", [document[:-1] for document in DOCUMENTS])
    open_shards([source], tmp_path / "out", tokenizer=tokenizer, progress=False)
    assert any("do not end with '<|endoftext|>', the tokenizer's end-of-text token" in said for said in caplog.messages)


def test_a_file_that_changed_afterwards_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    source = write_datatrove(tmp_path / "a.ds", DOCUMENTS)
    open_shards([source], tmp_path / "out", tokenizer=tokenizer, progress=False)
    damage(source, lambda data: b"\x09\x00" + data[2:])
    TokenShards(tmp_path / "out", "train")
    with pytest.raises(UserError, match=r"a\.ds does not have the hash that the manifest says"):
        TokenShards(tmp_path / "out", "train", verify=True)
    damage(source, lambda data: data[:-2])
    with pytest.raises(UserError, match=r"a\.ds has \d+ bytes, not the \d+ that the manifest says"):
        TokenShards(tmp_path / "out", "train")


def test_the_command_opens_and_says_what_to_type(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = write_datatrove(tmp_path / "a.ds", DOCUMENTS), tmp_path / "out"
    with pytest.raises(SystemExit, match="0"):
        main(["open-shards", str(source), "--tokenizer", str(tokenizer), "--output", str(output)])
    assert f"Train on it: peerlm train {output}" in capsys.readouterr().out
    assert json.loads((output / "manifest.json").read_text())["format"] == 2
    with pytest.raises(SystemExit) as ended:
        main(["open-shards", str(tmp_path / "no.ds"), "--tokenizer", str(tokenizer), "--output", str(tmp_path / "b")])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")
