"""What an evaluation file holds: documents to score, or passages whose last word is to be predicted."""

import json
from collections.abc import Iterator
from pathlib import Path

from peerlm.data.readers import read_jsonl, read_parquet, read_text
from peerlm.errors import UserError

PASSAGE = ("context", "continuation")
LAYOUTS = (("text",), ("prompt", "response"), PASSAGE)


def fields_of(path: Path) -> tuple[str, ...]:
    """The fields of a .jsonl file that are to be read, one of `LAYOUTS`; none where the file is not JSONL.

    Raises:
        UserError: no such file, or a first line of another layout.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file; name a text, JSONL or parquet file")
    if _kind(path) != ".jsonl":
        return ()
    first_line = next(read_text(path, _ignore)).lstrip().partition("\n")[0]
    try:
        row = json.loads(first_line)
    except ValueError:
        return LAYOUTS[0]  # reading the file says where it is wrong
    found = list(row) if isinstance(row, dict) else []
    for fields in LAYOUTS:
        if set(fields) <= set(found):
            return fields
    known = "; or ".join(" and ".join(fields) for fields in LAYOUTS)
    raise UserError(f"{path}:1: the fields are {', '.join(found) or 'none'}; a line needs {known}")


def read_passages(path: Path) -> Iterator[tuple[str, str]]:
    """The (context, continuation) of each line of LAMBADA's layout.

    Raises:
        UserError: the file is damaged or has no lines; with the line where one is wrong.
    """
    empty = True
    for context, continuation in _rows(path, PASSAGE):
        empty = False
        yield context, continuation
    if empty:
        raise UserError(f"{path} has no passages; leave it out")


def read_documents(path: Path, fields: tuple[str, ...]) -> Iterator[str]:
    """Documents of a file: the `fields` of each line of JSONL, joined as they are; column text of .parquet.

    Any other file is text, in which lines `<|endoftext|>` separate documents. Text and JSONL may be
    compressed (.xz, .gz).

    Raises:
        UserError: the file is damaged, binary or has no text; with the line where one is wrong.
    """
    if fields:
        documents: Iterator[str] = map("".join, _rows(path, fields))
    elif _kind(path) == ".parquet":
        documents = read_parquet(path, "text", _ignore)
    else:
        documents = read_text(path, _ignore)
    empty = True
    for document in documents:
        if document.strip():
            empty = False
            yield document
    if empty:
        raise UserError(f"{path} has no text; leave it out")


def _rows(path: Path, fields: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    return zip(*(read_jsonl(path, field, _ignore) for field in fields), strict=True)


def _kind(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".xz").removesuffix(".gz")).suffix


def _ignore(num_bytes: int) -> None:
    """Nobody wants to know how many bytes were read."""
