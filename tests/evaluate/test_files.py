import gzip
import io
import json
import lzma
import os
import random
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from peerlm.data import readers
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
        ("a.jsonl", lines({"prompt": "One.", "response": 2}), r"a\.jsonl:1: 'response' is of type int, not a string"),
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


class Counted(io.BufferedReader):
    """A file that counts the bytes that are read of it."""

    read_bytes = 0

    def read(self, size=-1):
        return self._count(super().read(size))

    def read1(self, size=-1):
        return self._count(super().read1(size))

    def readline(self, size=-1):
        return self._count(super().readline(size))

    def readinto(self, buffer):
        number = super().readinto(buffer)
        self.read_bytes += number
        return number

    def _count(self, content):
        self.read_bytes += len(content)
        return content


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_no_more_of_jsonl_is_read_than_is_asked_for(tmp_path, monkeypatch, suffix):
    rows = lines(*({"text": random.Random(number).randbytes(2000).hex()} for number in range(1000))).encode()
    compress = {"": bytes, ".gz": gzip.compress, ".xz": lambda rows: lzma.compress(rows, preset=0)}[suffix]
    path = write(tmp_path / f"a.jsonl{suffix}", compress(rows))
    opened = []

    def open_counted(self, mode):
        assert (self, mode) == (path, "rb")
        opened.append(Counted(io.FileIO(self)))
        return opened[-1]

    monkeypatch.setattr(Path, "open", open_counted)
    monkeypatch.setattr(readers, "_BUFFER_BYTES", 2**14)
    fields = fields_of(path)
    documents = read_documents(path, fields)
    for _ in range(3):
        next(documents)
    documents.close()
    assert fields == ("text",)
    assert sum(file.read_bytes for file in opened) < path.stat().st_size / 5


def test_memory_does_not_grow_with_jsonl(tmp_path, monkeypatch):
    """Nor is a file refused that is longer than a document may be."""
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 10_000)
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(lines({"text": "word " * 500}).encode() * 4000))
    tracemalloc.start()
    read = sum(len(document) for document in read_documents(path, fields_of(path)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert read == 4000 * 2500
    assert peak < read / 2


def test_the_fields_of_pairs_are_read_in_one_pass(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", lines({"prompt": "On", "response": "e."}, {"prompt": "T", "response": "wo."}))
    parsed = []
    monkeypatch.setattr(readers.json, "loads", lambda line, loads=json.loads: parsed.append(line) or loads(line))
    assert list(read_documents(path, ("prompt", "response"))) == ["One.", "Two."]
    assert len(parsed) == 2


def test_more_names_of_jsonl(tmp_path):
    assert read(write(tmp_path / "a.ndjson", lines({"text": "One."}))) == ["One."]


def test_fields_are_listed_up_to_a_bound(tmp_path):
    path = write(tmp_path / "a.jsonl", lines({f"field{number}": 1 for number in range(9000)}))
    with pytest.raises(UserError, match=r"the fields are field0, .*and 8,992 more; a line needs text") as caught:
        fields_of(path)
    assert len(str(caught.value)) < 400


def test_what_is_no_file_with_a_plain_name_is_refused_before_it_is_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match=r"pipe\.txt is not a file \(text is read more than once\)"):
        fields_of(tmp_path / "pipe.txt")
    (tmp_path / "link.txt").symlink_to("gone.txt")
    with pytest.raises(UserError, match=r"link\.txt is a link to gone\.txt, which is not there"):
        fields_of(tmp_path / "link.txt")
    strange = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt"))
    strange.write_text("text")
    with pytest.raises(UserError, match=r"caf\\xe9\.txt is not UTF-8: rename"):
        fields_of(strange)
