import gzip
import json
import lzma

import pyarrow
import pytest
from pyarrow import parquet

from peerlm.errors import UserError
from peerlm.evaluate.files import PASSAGE, fields_of, read_documents, read_passages

TEXT = "One.\n<|endoftext|>\nTwo <unk> .\n"


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path):
    return list(read_documents(path, fields_of(path)))


@pytest.mark.parametrize("name", ["a.txt", "a.tokens", "a", "a.PY"])
def test_any_other_name_is_text(tmp_path, name):
    assert read(write(tmp_path / name, TEXT)) == ["One.", "Two <unk> ."]


@pytest.mark.parametrize(("suffix", "compress"), [(".xz", lzma.compress), (".gz", gzip.compress)])
def test_compressed_files_are_read(tmp_path, suffix, compress):
    assert read(write(tmp_path / f"a.tokens{suffix}", compress(TEXT.encode()))) == ["One.", "Two <unk> ."]
    rows = lines({"text": "One."}).encode()
    assert read(write(tmp_path / f"a.jsonl{suffix}", compress(rows))) == ["One."]


def test_jsonl_is_known_by_its_fields(tmp_path):
    text = write(tmp_path / "text.jsonl", lines({"id": 1, "text": "One."}, {"id": 2, "text": "Two."}))
    pair = write(tmp_path / "pair.jsonl", "\n" + lines({"prompt": "On", "response": "e."}))
    passages = write(tmp_path / "passages.jsonl", lines({"context": "The", "continuation": "lamp"}))
    assert read(text) == ["One.", "Two."]
    assert read(pair) == ["One."]
    assert fields_of(passages) == PASSAGE
    assert list(read_passages(passages)) == [("The", "lamp")]


def test_the_column_text_of_parquet_is_read(tmp_path):
    parquet.write_table(pyarrow.table({"text": ["One.", "Two."]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["One.", "Two."]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", r"a\.txt has no text; leave it out"),
        ("a.txt", " \n<|endoftext|>\n\n", r"a\.txt has no text; leave it out"),
        ("a.txt", b"\x7fELF\0\1", r"a\.txt:1: a NUL byte"),
        ("a.txt", b"One.\n\xff\xfe", r"a\.txt:2: byte 0xff is not UTF-8"),
        ("a.txt.xz", b"not compressed", r"a\.txt\.xz: the compressed file is damaged"),
        ("a.parquet", b"not parquet", r"a\.parquet: not a parquet file"),
        ("a.jsonl", "", r"a\.jsonl has no text; leave it out"),
        ("a.jsonl", "One.", r"a\.jsonl:1: the line is not JSON"),
        ("a.jsonl", "[1]", r"a\.jsonl:1: the fields are none; a line needs text; or prompt and response; or"),
        (
            "a.jsonl",
            lines({"query": "?", "gold": 0}),
            r"a\.jsonl:1: the fields are query, gold; a line needs",
        ),
        ("a.jsonl", lines({"text": "One."}, {"txt": "Two."}), r"a\.jsonl:2: no field 'text', only: txt"),
        ("a.jsonl", lines({"prompt": "One.", "response": 2}), r"a\.jsonl:1: 'response' is a int"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=message):
        read(path)


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "absent.txt", tmp_path):
        with pytest.raises(UserError, match="is not a file; name"):
            fields_of(path)


def test_bad_passages_are_named(tmp_path):
    path = write(tmp_path / "a.jsonl", lines({"context": "a", "continuation": "b"}, {"context": "a"}))
    with pytest.raises(UserError, match=r"a\.jsonl:2: no field 'continuation', only: context"):
        list(read_passages(path))
    with pytest.raises(UserError, match="has no passages"):
        list(read_passages(write(tmp_path / "empty.jsonl", "")))
