"""Sources and readers: every format gives the same documents, and every broken input its sentence."""

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from peerlm.data import read_documents, readers
from peerlm.data.sources import HubDataset, fingerprint, resolve
from peerlm.errors import UserError


def as_text(documents: list[str]) -> bytes:
    return "\n<|endoftext|>\n".join(documents).encode()


def as_jsonl(documents: list[str]) -> bytes:
    return "\n".join(json.dumps({"id": 1, "text": document}) for document in documents).encode()


def as_parquet(documents: list[str]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"text": documents, "id": range(len(documents))}), sink, row_group_size=7)
    return sink.getvalue().to_pybytes()


FORMATS: dict[str, Callable[[list[str]], bytes]] = {
    "a.txt": as_text,
    "a.txt.xz": lambda documents: lzma.compress(as_text(documents)),
    "a.txt.gz": lambda documents: gzip.compress(as_text(documents)),
    "a.jsonl": as_jsonl,
    "a.jsonl.xz": lambda documents: lzma.compress(as_jsonl(documents)),
    "A.JSONL.GZ": lambda documents: gzip.compress(as_jsonl(documents)),
    "a.parquet": as_parquet,
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_agree(name: str, tmp_path: Path, documents: list[str]) -> None:
    path = tmp_path / name
    path.write_bytes(FORMATS[name](documents))
    advanced: list[int] = []

    assert list(read_documents([path], advance=advanced.append)) == documents
    assert sum(advanced) == path.stat().st_size


def test_text_layout(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(
        b"\xef\xbb\xbf\r\n\r\none\r\n two\r\n<|endoftext|>\r\n \n<|endoftext|> \nthree <|endoftext|> x\n\n"
    )
    assert list(read_documents([path])) == ["one\n two", "three <|endoftext|> x"]


def test_text_without_separator_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n")
    assert list(read_documents([path])) == ["one\n\ntwo"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1, max_size=5))
def test_jsonl_round_trip(tmp_path: Path, texts: list[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(json.dumps({"text": text}) for text in ["x", *texts]))
    assert list(read_documents([path])) == ["x", *(text for text in texts if not text.isspace())]


def test_other_text_field(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "x"}\n')
    assert list(read_documents([path], text_field="body")) == ["x"]


def test_folder_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.txt", "a.jsonl", "c.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    (tmp_path / "picture.png").write_bytes(b"\0")
    (tmp_path / ".hidden.txt").write_bytes(b"\0")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_bytes(b"\0")
    (tmp_path / "empty.txt").touch()

    assert list(read_documents([tmp_path])) == ["a.jsonl", "c.txt", "b/1.txt", "b/2.txt"]


def test_demo_is_embedded() -> None:
    [path] = resolve(["demo"])
    documents = read_documents(["demo"])
    assert isinstance(path, Path)
    assert len(next(documents)) > 500
    assert set(fingerprint(path)) == {"path", "sha256"}
    documents.close()


def test_reading_is_lazy(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "first"}\nbroken\n')
    documents = read_documents([path])
    assert next(documents) == "first"
    with pytest.raises(UserError, match=r"a\.jsonl:2: the line is not JSON"):
        next(documents)


def text_case(content: bytes, sentence: str, name: str = "a.txt") -> object:
    return pytest.param(name, content, sentence, id=sentence[:30])


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        text_case(b"", r"a\.txt holds no text"),
        text_case(b"\n<|endoftext|>\n  \n", r"a\.txt holds no text: leave it out"),
        text_case(b"one\ntw\0o\n", r"a\.txt:2: a NUL byte"),
        text_case(b"one\n<|endoftext|>\ntwo\nthr\xffee\n", r"a\.txt:4: byte 0xff is not UTF-8"),
        text_case(b"ok\ncut off \xc3", r"a\.txt:2: byte 0xc3 is not UTF-8"),
        text_case(b"no xz", r"a\.txt\.xz: the compressed file is damaged", "a.txt.xz"),
        text_case(lzma.compress(b"text" * 99)[:-20], r"xz: .* damaged or cut off", "a.txt.xz"),
        text_case(b"no gz", r"a\.txt\.gz: the compressed file is damaged", "a.txt.gz"),
        text_case(gzip.compress(b"text" * 99)[:-9], r"gz: .* damaged or cut off", "a.txt.gz"),
        text_case(b'{"text": "x"}\n{"text": x}\n', r"a\.jsonl:2: .*value at column 10", "a.jsonl"),
        text_case(b'{"text": "x"}\n\n{"text": "x', r"a\.jsonl:3: the line is not JSON \(Unterm", "a.jsonl"),
        text_case(b"[" * 100_000, r"a\.jsonl:1: the line is not JSON", "a.jsonl"),
        text_case(b"[1]\n", r"a\.jsonl:1: the line is a JSON list, not an object", "a.jsonl"),
        text_case(b'{"a": 1, "b": 2}\n', r"a\.jsonl:1: no field 'text', only: a, b;", "a.jsonl"),
        text_case(b"{}\n", r"a\.jsonl:1: no field 'text', only: none;", "a.jsonl"),
        text_case(b'{"text": 7}\n', r"a\.jsonl:1: 'text' is of type int, not a string", "a.jsonl"),
        text_case(b'{"text": null}\n', r"a\.jsonl:1: 'text' is of type NoneType", "a.jsonl"),
        text_case(rb'{"text": "ab\ud800"}' + b"\n", r"a\.jsonl:1: .* surrogate .* character 2", "a.jsonl"),
        text_case(b'{"text": "\xff"}\n', r"a\.jsonl:1: byte 0xff is not UTF-8", "a.jsonl"),
        text_case(b"no parquet", r"a\.parquet: not a parquet file", "a.parquet"),
        text_case(as_parquet(["x"] * 9)[:-20], r"a\.parquet: not a parquet file", "a.parquet"),
        text_case(b"text", r"a\.pdf is of an unknown kind: its name must end in", "a.pdf"),
    ],
)
def test_bad_file(name: str, content: bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=sentence) as caught:
        list(read_documents([path]))
    assert "\n" not in str(caught.value)


def test_bad_parquet_column(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": [1, 2], "body": ["x", None]}), path)
    with pytest.raises(UserError, match=r"a\.parquet: no column 'text', only: id, body;"):
        list(read_documents([path]))
    with pytest.raises(UserError, match=r"a\.parquet, row 1: 'id' is of type int, not a string"):
        list(read_documents([path], text_field="id"))
    with pytest.raises(UserError, match=r"a\.parquet, row 2: 'body' is of type NoneType"):
        list(read_documents([path], text_field="body"))


def test_parquet_damaged_inside(tmp_path: Path) -> None:
    content = bytearray(as_parquet([f"document {number}" for number in range(500)]))
    content[200:2000] = bytes(1800)
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet: damaged after row \d+"):
        list(read_documents([path]))


def test_document_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 20)
    for name, content, line in [
        ("a.txt", "x\n<|endoftext|>\nshort\n" + "0123456789\n" * 2, 3),
        ("b.txt", "x\n" + "0123456789" * 3, 2),
        ("a.jsonl", '{"text": "x"}\n{"text": "0123456789"}', 2),
    ]:
        path = tmp_path / name
        path.write_text(content)
        with pytest.raises(UserError, match=rf"{name}:{line}: a document of more than 20 bytes: put a line"):
            list(read_documents([path]))


def test_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there are no sources"):
        resolve([])
    with pytest.raises(UserError, match=r"nowhere\.txt does not exist"):
        resolve([tmp_path / "nowhere.txt"])
    (tmp_path / "notes.doc").write_text("x")
    with pytest.raises(UserError, match="has no file to read"):
        resolve([tmp_path])


def test_hub_names() -> None:
    assert HubDataset.parse("hf:a/b") == HubDataset("a/b", None, "train")
    assert HubDataset.parse("hf:a/b:c") == HubDataset("a/b", "c", "train")
    assert HubDataset.parse("hf:a/b::test") == HubDataset("a/b", None, "test")
    assert fingerprint(HubDataset("a/b", None, "test")) == {"dataset": "a/b", "config": None, "split": "test"}
    for source in ("hf:", "hf:a:b:c:d"):
        with pytest.raises(UserError, match="names no data set: write hf:NAME"):
            HubDataset.parse(source)


def test_hub_streams_a_folder_in_its_layout(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(as_jsonl(["one", "two"]))
    (tmp_path / "test.jsonl").write_bytes(as_jsonl(["three"]))
    assert list(read_documents([f"hf:{tmp_path}", f"hf:{tmp_path}:default:test"])) == ["one", "two", "three"]
    with pytest.raises(UserError, match="row 1: no field 'body', only: id, text;"):
        list(read_documents([f"hf:{tmp_path}"], text_field="body"))
    with pytest.raises(UserError, match=r"split 'nope'.*cannot be loaded.*check the name"):
        list(read_documents([f"hf:{tmp_path}::nope"]))
    with pytest.raises(UserError, match=r"config nope.*cannot be loaded"):
        list(read_documents([f"hf:{tmp_path}:nope"]))


def test_hub_out_of_reach() -> None:
    with pytest.raises(UserError, match=r"data set 'nobody/nothing' .* cannot be loaded") as caught:
        list(read_documents(["hf:nobody/nothing"]))
    assert "\n" not in str(caught.value)
