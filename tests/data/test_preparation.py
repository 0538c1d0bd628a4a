"""Preparation: the shards hold the text, the split is as promised, and what fails leaves nothing behind."""

import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from peerlm.data import Manifest, TokenShards, load_tokenizer, prepare, read_documents
from peerlm.data.manifest import SplitRecord
from peerlm.data.progress import progress_bar
from peerlm.data.split import choose_heldout, copy_key, document_key
from peerlm.data.tokenizer import train_tokenizer
from peerlm.data.writer import SplitWriter
from peerlm.errors import PeerlmWarning, UserError

prepare_module = importlib.import_module("peerlm.data.preparation")


def small(source: Path, output: Path, **changes: Any) -> Manifest:
    settings = {"vocab_size": 300, "holdout": 0.2, "shard_tokens": 500, "progress": False}
    return prepare([source], output, **{**settings, **changes})


def decoded(folder: Path, split: str) -> list[str]:
    """The documents of a split, cut at the document ends, decoded."""
    shards, tokenizer = TokenShards(folder, split, verify=True), load_tokenizer(folder)
    ends = shards.document_ends.tolist()
    documents = [shards.tokens(start, stop) for start, stop in zip([0, *ends[:-1]], ends, strict=True)]
    assert all(document[-1] == shards.eos_token_id for document in documents)
    return [tokenizer.decode(document[:-1]) for document in documents]


def test_text_to_tokens_to_text(prepared: Path, documents: list[str]) -> None:
    train, heldout = decoded(prepared, "train"), decoded(prepared, "heldout")
    assert sorted(train + heldout) == sorted(documents)
    assert train == [document for document in documents if document in train]
    assert not set(train) & set(heldout)


def test_manifest_adds_up(prepared: Path, documents: list[str]) -> None:
    manifest = Manifest.read(prepared)
    train, heldout = manifest.splits["train"], manifest.splits["heldout"]
    total = sum(len(document.encode()) for document in documents)
    assert train.bytes == sum(len(document.encode()) for document in decoded(prepared, "train"))
    assert train.bytes + heldout.bytes == total
    assert 0.15 * total < heldout.bytes <= 0.2 * total
    assert train.documents + heldout.documents == len(documents)
    assert len(train.shards) > 3
    assert [shard.items for shard in train.shards[:-1]] == [500] * (len(train.shards) - 1)
    assert (manifest.vocab_size, manifest.dtype, manifest.eos_token_id) == (300, "<u2", 0)


def test_documents_span_shards(prepared: Path) -> None:
    shards = TokenShards(prepared, "train")
    assert any(end % 500 for end in shards.document_ends.tolist()[:-1])
    assert not any(end % 500 == 0 for end in shards.document_ends.tolist()[:-1])


def test_copies_fall_on_one_side(tmp_path: Path, documents: list[str]) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("\n".join(json.dumps({"text": text}) for text in documents * 2))
    small(source, tmp_path / "out")
    train, heldout = decoded(tmp_path / "out", "train"), decoded(tmp_path / "out", "heldout")
    assert len(train) + len(heldout) == 80
    assert not set(train) & set(heldout)


def test_seed_changes_the_split(text_file: Path, tmp_path: Path) -> None:
    small(text_file, tmp_path / "a")
    small(text_file, tmp_path / "b", seed=1)
    assert set(decoded(tmp_path / "a", "heldout")) != set(decoded(tmp_path / "b", "heldout"))


def test_held_out_text_teaches_the_tokenizer_nothing(tmp_path: Path, documents: list[str]) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("\n".join(json.dumps({"text": text}) for text in documents))
    small(source, tmp_path / "out")
    expected = train_tokenizer(decoded(tmp_path / "out", "train"), 300)
    assert load_tokenizer(tmp_path / "out").get_vocab() == expected.get_vocab()


def test_sample_for_the_tokenizer_is_bounded(text_file: Path, tmp_path: Path) -> None:
    with progress_bar(False) as bar:
        scan = prepare_module._scan([text_file], "text", 0, 1000, None, bar)
    sizes = [len(text.encode()) for _, text in scan.sample]
    assert 500 < sum(sizes) <= 1000
    assert [document_key(text.encode(), 0) for _, text in scan.sample] == sorted(scan.order)[: len(sizes)]
    assert all(key == copy_key(text, 0) for key, text in scan.sample)


def test_long_documents_are_tokenized_in_pieces(tmp_path: Path, documents: list[str]) -> None:
    tokenizer_module = importlib.import_module("peerlm.data.tokenizer")
    source = tmp_path / "a.jsonl"
    source.write_text("\n".join(json.dumps({"text": text}) for text in documents))
    small(source, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "_PIECE_CHARACTERS", 60)
        patch.setattr(prepare_module, "_BATCH_CHARACTERS", 200)
        small(source, tmp_path / "cut")
    for split in ("train", "heldout"):
        assert decoded(tmp_path / "cut", split) == decoded(tmp_path / "whole", split)


@pytest.mark.parametrize("as_file", [False, True])
def test_given_tokenizer(as_file: bool, text_file: Path, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["other words"], 270)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer.json" if as_file else tmp_path / "tokenizer"
    manifest = small(text_file, tmp_path / "out", tokenizer=path, vocab_size=1)
    assert load_tokenizer(tmp_path / "out").get_vocab() == tokenizer.get_vocab()
    assert manifest.vocab_size == len(tokenizer)


def test_a_large_vocabulary_takes_four_bytes(text_file: Path, tmp_path: Path) -> None:
    words = {"<|endoftext|>": 0, "a": 2**16}
    tokenizer = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel(words, unk_token="a")).save(str(tokenizer))
    with pytest.warns(PeerlmWarning) as caught:
        manifest = small(text_file, tmp_path / "out", tokenizer=tokenizer)
    assert [str(each.message).split("%")[0].rpartition(" ")[0] for each in caught] == [
        "the tokenizer does not know",
        "the tokenizer does not keep",
    ]
    assert (manifest.dtype, manifest.vocab_size) == ("<u4", 2**16 + 1)
    assert TokenShards(tmp_path / "out", "train").tokens(0, 2).tolist() == [2**16, 0]


def test_equal_request_returns_at_once(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = small(text_file, tmp_path / "out")
    monkeypatch.setattr(prepare_module, "read_documents", None)
    assert small(text_file, tmp_path / "out") == first


def test_same_twice(text_file: Path, tmp_path: Path) -> None:
    assert small(text_file, tmp_path / "a") == small(text_file, tmp_path / "b")


def test_other_request_is_refused(text_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = small(text_file, output)
    with pytest.raises(UserError, match=r"out was prepared with seed = 0, not 1: choose another output"):
        small(text_file, output, seed=1)
    os.utime(text_file, ns=(1, 1))
    with pytest.raises(UserError, match="out was prepared with sources"):
        small(text_file, output)
    assert Manifest.read(output) == first


def test_other_content_is_refused(text_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    for path in (output, output / "thesis.txt"):
        with pytest.raises(UserError, match="exists and holds something other than prepared data: choose another"):
            small(text_file, path)
    assert (output / "thesis.txt").read_text() == "years of work"


def test_damaged_output_is_not_taken_for_complete(text_file: Path, tmp_path: Path) -> None:
    small(text_file, tmp_path / "out")
    (tmp_path / "out" / "train-00001.bin").unlink()
    with pytest.raises(UserError, match=r"train-00001\.bin is missing"):
        small(text_file, tmp_path / "out")


def test_empty_folder_is_free(text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "deep" / "out").mkdir(parents=True)
    small(text_file, tmp_path / "deep" / "out")
    small(text_file, tmp_path / "deeper" / "still" / "out")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"vocab_size": 256}, "vocab_size is 256: it must be at least 257"),
        ({"holdout": 0.0}, "holdout is 0.0: it must lie between 0 and 1"),
        ({"holdout": 1.0}, "holdout is 1.0"),
        ({"holdout": float("nan")}, "holdout is nan"),
        ({"seed": -1}, "seed is -1: it must be 0 or more"),
        ({"shard_tokens": 0}, "shard_tokens and tokenizer_bytes must be 1 or more, got 0 and"),
        ({"tokenizer_bytes": 0}, "shard_tokens and tokenizer_bytes must be 1 or more, got 500 and 0"),
        ({"tokenizer_bytes": 1}, "tokenizer_bytes is 1, too few for one training document"),
        ({"tokenizer": "nowhere"}, "nowhere has no tokenizer"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], sentence: str, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        small(text_file, tmp_path / "out", **changes)
    assert list(tmp_path.iterdir()) == [text_file]


def held_out_and_trained_on(folder: Path) -> tuple[set[str], set[str]]:
    """The words of the documents of both splits, which is what copies have in common."""
    heldout, train = (
        {" ".join(text.replace("\ufeff", "").split()) for text in decoded(folder, split)}
        for split in ("heldout", "train")
    )
    return heldout, train


@pytest.mark.parametrize("ending", ["", "\n", " ", "\r\n"])
def test_a_document_and_its_copies_lie_in_one_split(
    ending: str, text_file: Path, tmp_path: Path, documents: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "copies.jsonl"
    copies = [f"\ufeff{text}{ending}".replace("\n", "\r\n", 1) for text in documents]
    source.write_text("\n".join(json.dumps({"text": text}) for text in copies))
    manifest = prepare([text_file, source], tmp_path / "out", vocab_size=300, holdout=0.2, progress=False)
    heldout, train = held_out_and_trained_on(tmp_path / "out")
    assert len(heldout) > 3
    assert not heldout & train
    assert len(heldout) + len(train) == len(documents)
    assert manifest.copies == len(documents)
    assert Manifest.read(tmp_path / "out").copies == len(documents)
    assert caplog.messages == [
        "40 of the 80 documents are copies of others, white space and line ends aside; a document and its copies lie "
        "in one split."
    ]


def test_without_copies_documents_are_held_out_in_the_order_of_their_bytes_hash(
    prepared: Path, documents: list[str]
) -> None:
    keys = [document_key(text.encode(), 0) for text in documents]
    chosen = choose_heldout(keys, [len(text.encode()) for text in documents], 0.2)
    assert decoded(prepared, "heldout") == [text for key, text in zip(keys, documents, strict=True) if key in chosen]


def test_the_end_of_a_single_document_is_held_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [f"Line {number} tells of {number * number} ships." for number in range(2000)]
    source = tmp_path / "book.txt"
    source.write_text("\n\n".join(lines) + "\n")
    manifest = prepare([source, source], tmp_path / "out", vocab_size=300, holdout=0.1, progress=False)
    [train], [heldout] = decoded(tmp_path / "out", "train"), decoded(tmp_path / "out", "heldout")
    assert f"{train}\n\n{heldout}" == "\n\n".join(lines)
    assert 0.09 < len(heldout) / len(train) < 0.12
    assert manifest.copies == 0
    [said] = caplog.messages
    assert said.startswith("The text is one document, so its end is held out: ")
    assert "Its other copies, 1 of them, are left out. To hold out whole documents, put" in said


def test_the_tokenizer_learns_from_a_document_longer_than_its_sample(tmp_path: Path) -> None:
    source = tmp_path / "book.txt"
    source.write_text("\n".join(f"Line {number} tells of {number * number} ships." for number in range(9000)))
    assert source.stat().st_size > 3 * 2**16
    manifest = prepare([source], tmp_path / "out", vocab_size=300, tokenizer_bytes=2**17, holdout=0.1, progress=False)
    assert manifest.vocab_size == 300


def test_nothing_is_held_out_where_that_is_asked_for(tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("just one")
    manifest = small(source, tmp_path / "out", holdout=None)
    assert decoded(tmp_path / "out", "train") == ["just one"]
    assert TokenShards(tmp_path / "out", "heldout", verify=True).num_tokens == 0
    assert small(source, tmp_path / "out", holdout=None) == manifest


def test_more_is_held_out_of_a_short_text(text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    total = text_file.stat().st_size
    manifest = small(text_file, tmp_path / "out", holdout=0.02, heldout_bytes=total // 6)
    assert 0.13 < manifest.splits["heldout"].bytes / total < 0.17
    assert "of the text is held out where 2% was asked for" in caplog.text
    with pytest.raises(UserError, match=r"was prepared with heldout_bytes = \d+, not None"):
        small(text_file, tmp_path / "out", holdout=0.02)


def test_files_that_are_read_and_not_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.md").write_text(f"Document {number}.")
    for name in ("a.html", "b.html", "c.png", ".hidden.txt"):
        (folder / name).write_text("x")
    manifest = small(folder, tmp_path / "out")
    assert manifest.files == {"read": {".md": 12}, "passed_over": {"hidden": 1, ".html": 2, ".png": 1}}
    assert "Of the files, 12 are read (12 .md) and 4 are passed over (2 .html, 1 hidden, 1 .png)." in caplog.messages


def test_a_refusal_does_not_list_thousands_of_files(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(100):
        (folder / f"{number}.txt").write_text(f"Document {number}.")
    small(folder, tmp_path / "out")
    with pytest.raises(UserError, match=r"sources = .*/0\.txt and 99 more, not .*/7\.txt: choose another") as caught:
        small(folder / "7.txt", tmp_path / "out")
    assert len(str(caught.value)) < 1000


def test_a_name_that_is_not_utf8_is_refused_before_the_work(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "read_documents", None)
    with pytest.raises(UserError, match=r"out\\xe9 is not UTF-8: rename"):
        small(text_file, tmp_path / os.fsdecode(b"out\xe9"))


def test_one_document_cannot_be_split(tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("just one")
    with pytest.raises(UserError, match="the sources hold 1 distinct document"):
        small(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_failure_leaves_nothing(
    error: BaseException, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: SplitWriter, num_bytes: int) -> None:
        raise error

    monkeypatch.setattr(SplitWriter, "end_document", fail)
    with pytest.raises(type(error)):
        small(text_file, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [text_file]


def test_sources_that_change_meanwhile(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = prepare_module._scan

    def scan_then_change(*arguments: Any) -> Any:
        found = scan(*arguments)
        with text_file.open("a") as file:
            file.write("one line more\n")
        return found

    monkeypatch.setattr(prepare_module, "_scan", scan_then_change)
    with pytest.raises(UserError, match="the sources changed while they were read, from 40 documents of"):
        small(text_file, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [text_file]


def test_killed_preparation_does_not_look_complete(text_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    program = (
        "import importlib, sys, time\n"
        "from peerlm.data.writer import SplitWriter\n"
        "prepare = importlib.import_module('peerlm.data.preparation')\n"
        "SplitWriter.end_document = lambda self, num_bytes: (print('writing', flush=True), time.sleep(60))\n"
        "prepare.prepare([sys.argv[1]], sys.argv[2], vocab_size=300, holdout=0.2, progress=False)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(text_file), str(output)], stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
    assert not output.exists()
    with pytest.raises(UserError, match="holds no prepared data"):
        TokenShards(output, "train")
    small(text_file, output)


def test_progress_is_shown(text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small(text_file, tmp_path / "out", progress=True)
    shown = capsys.readouterr()
    assert f"{text_file.stat().st_size / 1000:.1f}" in shown.err
    assert "tokenizing" in shown.err
    assert shown.out == ""


def test_demo_begins_with_real_documents() -> None:
    documents = read_documents(["demo"])
    assert [len(next(documents)) > 500 for _ in range(3)] == [True] * 3
    documents.close()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(
    parts=st.lists(st.lists(st.integers(0, 2**16 - 1), max_size=9), min_size=1, max_size=6),
    shard_tokens=st.integers(1, 7),
)
def test_writer_and_shards_agree(tmp_path: Path, parts: list[list[int]], shard_tokens: int) -> None:
    """Any parts, written into shards of any length, read back as they were, over every range."""
    folder = tmp_path / str(time.monotonic_ns())
    folder.mkdir()
    tokens = [1, *(token for part in parts for token in part)]
    records: dict[str, SplitRecord] = {}
    for split in ("train", "heldout"):
        with SplitWriter(folder, split, "<u2", shard_tokens) as writer:
            for part in [[1], *parts]:
                writer.append(np.array(part, np.int64))
            writer.end_document(5)
            records[split] = writer.finish()
    Manifest(
        format=1,
        request={},
        vocab_size=2**16,
        eos_token_id=0,
        dtype="<u2",
        tokenizer_sha256="",
        splits=records,
    ).write(folder)

    shards = TokenShards(folder, "train", verify=True)
    assert shards.document_ends.tolist() == [len(tokens)]
    assert (shards.num_tokens, shards.num_bytes) == (len(tokens), 5)
    for start in range(len(tokens) + 1):
        for stop in range(start, len(tokens) + 1):
            assert shards.tokens(start, stop).tolist() == tokens[start:stop]
