"""What an evaluation file holds: documents to score, or passages whose last word is to be predicted."""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from peerlm.data.readers import first_fields, read_jsonl, read_parquet, read_text, read_text_in_parts
from peerlm.data.text_files import JSONL, PARQUET, check_file, file_kind
from peerlm.errors import UserError, listed

PASSAGE = ("context", "continuation")
LAYOUTS = (("text",), ("prompt", "response"), PASSAGE)


def fields_of(path: Path) -> tuple[str, ...]:
    """The fields of a .jsonl file that are to be read, one of `LAYOUTS`; none where the file is not JSONL.

    Of the file's content only the first line is read.

    Raises:
        UserError: no such file, a pipe, a name that is not UTF-8, or a first line of another layout.
    """
    if path.is_dir() or not (path.exists() or path.is_symlink()):
        raise UserError(f"{path} is not a file; name a text, JSONL or parquet file")
    check_file(path)
    if file_kind(path) != JSONL:
        return ()
    found = first_fields(path)
    if found is None:
        return LAYOUTS[0]  # reading the file says that it is empty
    for fields in LAYOUTS:
        if set(fields) <= set(found):
            return fields
    known = "; or ".join(" and ".join(fields) for fields in LAYOUTS)
    raise UserError(f"{path}:1: the fields are {listed(found)}; a line needs {known}")


def read_passages(path: Path) -> Iterator[tuple[str, str]]:
    """The (context, continuation) of each line of LAMBADA's layout.

    Raises:
        UserError: the file is damaged or has no lines; with the line where one is wrong.
    """
    empty = True
    for context, continuation in read_jsonl(path, PASSAGE, _ignore):
        empty = False
        yield context, continuation
    if empty:
        raise UserError(f"{path} has no passages; leave it out")


def read_document_parts(path: Path, fields: tuple[str, ...]) -> Iterator[Iterable[str]]:
    """As `read_documents`, but each document in parts, so that no more of a text file is read than is asked for.

    The parts of a document must be read before the next document.
    """
    if fields or file_kind(path) == PARQUET:
        for document in read_documents(path, fields):
            yield [document]
        return
    empty = True
    for parts in read_text_in_parts(path, _ignore):
        begun = []
        for part in parts:
            begun.append(part)
            if part.strip():
                empty = False
                yield chain(begun, parts)
                break
    if empty:
        raise _no_text(path)


def read_documents(path: Path, fields: tuple[str, ...]) -> Iterator[str]:
    """Documents of a file: the `fields` of each line of JSONL, joined as they are; column text of .parquet.

    Any other file is text, in which lines `<|endoftext|>` separate documents. Text and JSONL may be
    compressed (.xz, .gz).

    Raises:
        UserError: the file is damaged, binary or has no text; with the line where one is wrong.
    """
    if fields:
        documents: Iterator[str] = map("".join, read_jsonl(path, fields, _ignore))
    elif file_kind(path) == PARQUET:
        documents = read_parquet(path, "text", _ignore)
    else:
        documents = read_text(path, _ignore)
    empty = True
    for document in documents:
        if document.strip():
            empty = False
            yield document
    if empty:
        raise _no_text(path)


def _no_text(path: Path) -> UserError:
    return UserError(f"{path} has no text; leave it out")


def _ignore(num_bytes: int) -> None:
    """Counts of bytes are not needed here."""
