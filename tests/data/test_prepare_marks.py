"""Preparation with a tokenizer that is given: where documents begin, and what it loses."""

import json
from pathlib import Path

import pytest
import torch

from peerlm.data import Manifest, TokenShards, TokenWindows, load_tokenizer, prepare
from peerlm.errors import PeerlmWarning, UserError
from peerlm.marks import document_marks

DOCUMENTS = ["river lantern moss quiet", "copper ladder", "winter orchard signal", "paper harbour tin violet", "tin"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n<|endoftext|>\n".join(DOCUMENTS), encoding="utf-8")
    return path


@pytest.fixture
def make(tmp_path: Path, text: Path, make_tokenizer):
    """A function: options of the tokenizer, and arguments of `prepare` -> the prepared folder."""

    def build(kind="bytes", *, name="out", start="auto", config=None, **options) -> Path:
        folder = tmp_path / f"{name}-tokenizer"
        make_tokenizer(kind, **options).save_pretrained(folder)
        if config:
            (folder / "config.json").write_text(json.dumps(config))
        prepare([text], tmp_path / name, tokenizer=folder, holdout=0.3, document_start=start, progress=False)
        return tmp_path / name

    return build


def documents_of(folder: Path) -> list[list[int]]:
    shards = TokenShards(folder, "train")
    ends = shards.document_ends.tolist()
    return [shards.tokens(*where).tolist() for where in zip([0, *ends[:-1]], ends, strict=True)]


def test_documents_begin_and_end_as_the_tokenizer_says(make) -> None:
    folder = make(template="<s> $A", bos="<s>")
    tokenizer, manifest = load_tokenizer(folder), Manifest.read(folder)
    documents = documents_of(folder)
    assert all((ids[0], ids[-1]) == (0, 1) for ids in documents)
    assert {tokenizer.decode(ids[1:-1]) for ids in documents} < set(DOCUMENTS)
    assert (manifest.document_start, manifest.document_end, manifest.lost) == ((0,), (1,), {})
    assert sum(split.bytes for split in manifest.splits.values()) == sum(map(len, DOCUMENTS))


def test_the_model_beside_the_tokenizer_is_asked(make) -> None:
    assert all(ids[0] == 2 for ids in documents_of(make(config={"bos_token_id": 2})))


def test_one_end_of_text_token_parts_documents_where_nothing_else_begins_them(make) -> None:
    for name, options in {"a": {"bos": "</s>"}, "b": {"template": "$A </s>"}}.items():
        folder = make(name=name, **options)
        assert all(ids[-1] == 1 and 1 not in ids[:-1] and 0 not in ids for ids in documents_of(folder))
        assert Manifest.read(folder).document_start == ()


def test_a_start_that_is_asked_for_is_written_and_becomes_the_template(make) -> None:
    folder = make(start="<pad>", template="<s> $A", bos="<s>")
    assert all((ids[0], ids[-1]) == (2, 1) for ids in documents_of(folder))
    assert document_marks(load_tokenizer(folder)).start == (2,)
    plain = make(name="plain", start="none", template="<s> $A", bos="<s>")
    assert all(0 not in ids and 2 not in ids for ids in documents_of(plain))
    assert document_marks(load_tokenizer(plain)).streamed


def test_another_start_is_another_request(make) -> None:
    make(template="<s> $A", bos="<s>")
    for start in ("none", "<pad>"):
        with pytest.raises(UserError, match=r"was prepared with document_start = \[0\], not"):
            make(start=start, template="<s> $A", bos="<s>")


def test_a_tokenizer_that_is_learned_has_one_mark(text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="document_start is 'none', but a tokenizer that is learned has one mark"):
        prepare([text], tmp_path / "out", document_start="none", progress=False)


def test_every_window_begins_as_documents_do(make) -> None:
    shards = TokenShards(make(template="<s> $A", bos="<s>"), "train")
    windows = TokenWindows(shards, 5)
    assert len(windows) == (shards.num_tokens - 1) // 4 > 3
    for index in range(len(windows)):
        stored = shards.tokens(4 * index, 4 * index + 5).tolist()
        assert windows[index].tolist() == (stored if stored[0] == 0 else [0, *stored[:4]])
        assert windows[index].dtype == torch.int64
    with pytest.raises(UserError, match="context is 2, but 2 tokens begin each window"):
        TokenWindows(TokenShards(make(name="two", template="<pad> <s> $A"), "train"), 2)


def test_what_the_tokenizer_drops_is_said_and_its_bytes_not_counted(make, text: Path) -> None:
    text.write_text("\n<|endoftext|>\n".join(f"{each} 東京" for each in DOCUMENTS), encoding="utf-8")
    with pytest.warns(PeerlmWarning, match=r"no token for 25% of the text \(such as '東' '京'\)"):
        folder = make("spaces")
    manifest = Manifest.read(folder)
    kept = sum(len(each) + 1 for each in DOCUMENTS)
    assert manifest.lost == {"dropped": pytest.approx(30 / (kept + 30))}
    assert sum(split.bytes for split in manifest.splits.values()) == kept
