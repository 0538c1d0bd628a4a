"""Readers of the file formats: each streams the texts of a file or data set, and says where one is wrong."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

from peerlm.errors import UserError, listed

SEPARATOR = b"<|endoftext|>"
MAX_DOCUMENT_BYTES = 2**30

Advance = Callable[[int], object]
"""Called with the number of bytes on disk read since the last call."""

_LINES_PER_ADVANCE = 1024
_BUFFER_BYTES = 2**20
_PART_BYTES = 2**16
_ROWS_PER_BATCH = 256


def read_text(path: Path, advance: Advance) -> Iterator[str]:
    """Documents of a text file: the lines between separator lines, `<|endoftext|>`, or else the whole file.

    Windows line ends become single newlines; newlines around a document and a byte order mark are taken off.
    """
    content = bytearray()
    first_line = 1
    for number, line in _lines(path, advance):
        if line.strip() == SEPARATOR:
            yield _decode(content, path, first_line).strip("\n")
            content, first_line = bytearray(), number + 1
        else:
            content += line
            _check_size(len(content), f"{path}:{first_line}")
    yield _decode(content, path, first_line).strip("\n")


def read_text_in_parts(path: Path, advance: Advance) -> Iterator[Iterator[str]]:
    """As `read_text`, but each document in parts, of some lines each, and nothing is read before it is asked for.

    The parts of a document must be read before the next document.
    """
    lines = _lines(path, advance)
    more = True

    def parts() -> Iterator[str]:
        nonlocal more
        content, first_line = bytearray(), 0
        for number, line in lines:
            if line.strip() == SEPARATOR:
                break
            first_line = first_line or number
            content += line
            if len(content) >= _PART_BYTES:
                yield _decode(content, path, first_line)
                content, first_line = bytearray(), 0
        else:
            more = False
        yield _decode(content, path, first_line)

    while more:
        yield _stripped(parts())


def _stripped(parts: Iterator[str]) -> Iterator[str]:
    """Without newlines around the whole."""
    begun, held = False, ""
    for part in parts:
        text = held + part if begun else part.lstrip("\n")
        if text:
            kept = text.rstrip("\n")
            begun, held = True, text[len(kept) :]
            yield kept


def read_jsonl(path: Path, fields: Sequence[str], advance: Advance) -> Iterator[tuple[str, ...]]:
    """These fields of each line, a JSON object; blank lines are passed over."""
    for where, row in _values(path, advance):
        if not isinstance(row, dict):
            raise UserError(f"{where}: the line is a JSON {type(row).__name__}, not an object with a text field")
        yield tuple(_field(row, name, where) for name in fields)


def first_fields(path: Path) -> list[str] | None:
    """The names of the fields on the first line of JSONL, beyond which nothing is read; None where there is no line.

    Raises UserError where that line is not JSON.
    """
    with closing(_values(path, lambda num_bytes: None)) as values:
        for _, row in values:
            return list(row) if isinstance(row, dict) else []
    return None


def read_parquet(path: Path, text_field: str, advance: Advance) -> Iterator[str]:
    """The column `text_field`, a few hundred rows at a time."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f'{path}: a parquet file needs pyarrow to be read: pip install "peerlm[data]"') from error
    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a parquet file, or one that is cut off ({error}): restore it") from error
    with file:
        if text_field not in file.schema_arrow.names:
            raise _missing_field(str(path), "column", text_field, file.schema_arrow.names)
        num_bytes, num_rows = path.stat().st_size, file.metadata.num_rows
        row = advanced = 0
        try:
            for batch in file.iter_batches(_ROWS_PER_BATCH, columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield _as_text(value, text_field, f"{path}, row {row}")
                advance(num_bytes * row // num_rows - advanced)
                advanced = num_bytes * row // num_rows
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise UserError(f"{path}: damaged after row {row} ({error}): restore it") from error


def read_hub(name: str, config: str | None, split: str, text_field: str) -> Iterator[str]:
    """The column `text_field` of a Hugging Face data set (or of a local folder in its layout), streamed."""
    where = f"data set {name!r}"
    try:
        import datasets
    except ImportError as error:
        raise UserError(f'{where} needs the package datasets to be read: pip install "peerlm[data]"') from error
    from huggingface_hub.errors import HfHubHTTPError

    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
    except (OSError, ValueError, RuntimeError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
        detail = " ".join(str(error).split())
        raise UserError(
            f"{where} (config {config or 'default'}, split {split!r}) cannot be loaded: {detail}; check the "
            "name and the network"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield _field(row, text_field, f"{where}, row {number}")


def _values(path: Path, advance: Advance) -> Generator[tuple[str, Any], None, None]:
    """The place and value of each line of JSON that is not blank."""
    for number, line in _lines(path, advance):
        where = f"{path}:{number}"
        content = _decode(line, path, number)
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            reason = str(error)
            if isinstance(error, json.JSONDecodeError):
                reason = f"{error.msg} at column {error.colno}"
            raise UserError(f"{where}: the line is not JSON ({reason}): fix or remove it") from error
        yield where, row


def _lines(path: Path, advance: Advance) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of a plain, .xz or .gz file, line ends kept, without NUL bytes."""
    advanced = 0
    with path.open("rb") as raw, closing(_decompressed(raw, path)) as stream:
        try:
            for number, line in enumerate(iter(lambda: stream.readline(MAX_DOCUMENT_BYTES + 1), b""), start=1):
                if b"\0" in line:
                    raise UserError(f"{path}:{number}: a NUL byte, so this is not a UTF-8 text file: leave it out")
                _check_size(len(line), f"{path}:{number}")
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if number % _LINES_PER_ADVANCE == 0:
                    advance(raw.tell() - advanced)
                    advanced = raw.tell()
        except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{path}: the compressed file is damaged or cut off ({error}): restore it") from error
        advance(raw.tell() - advanced)


def _decompressed(raw: BinaryIO, path: Path) -> BinaryIO:
    suffix = path.suffix.lower()
    if suffix not in (".xz", ".gz"):
        return raw
    stream = lzma.LZMAFile(raw) if suffix == ".xz" else gzip.GzipFile(fileobj=raw)  # noqa: SIM115 (returned open)
    # Reads lines twice as fast as the stream itself, whose readline is a Python function.
    return io.BufferedReader(stream, _BUFFER_BYTES)


def _decode(content: bytes | bytearray, path: Path, first_line: int) -> str:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        byte = content[error.start]
        raise UserError(
            f"{path}:{line}: byte 0x{byte:02x} is not UTF-8: convert the file to UTF-8, or leave it out if "
            "it is not text"
        ) from error
    return text.replace("\r\n", "\n")


def _check_size(num_bytes: int, where: str) -> None:
    if num_bytes > MAX_DOCUMENT_BYTES:
        raise UserError(
            f"{where}: a document of more than {MAX_DOCUMENT_BYTES} bytes: put a line {SEPARATOR.decode()} "
            "between documents"
        )


def _field(row: dict[str, Any], text_field: str, where: str) -> str:
    if text_field not in row:
        raise _missing_field(where, "field", text_field, list(row))
    return _as_text(row[text_field], text_field, where)


def _missing_field(where: str, kind: str, text_field: str, found: list[str]) -> UserError:
    return UserError(f"{where}: no {kind} {text_field!r}, only: {listed(found)}; name the one to read with text_field")


def _as_text(value: object, text_field: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {text_field!r} is of type {type(value).__name__}, not a string: fix or drop the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: {text_field!r} has half a surrogate pair at character {error.start}, that is no text: "
            "fix or drop the row"
        ) from error
    return value
