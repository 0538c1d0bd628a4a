"""Sources: what names a text, where its files are, and the stream of documents that they hold."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from peerlm.data.readers import Advance, read_hub, read_jsonl, read_parquet, read_text
from peerlm.errors import UserError

DEMO = "demo"
HUB_PREFIX = "hf:"
SUFFIXES = (".txt", ".txt.xz", ".txt.gz", ".jsonl", ".jsonl.xz", ".jsonl.gz", ".parquet")


@dataclass(frozen=True)
class HubDataset:
    """A data set by its Hugging Face name."""

    name: str
    config: str | None
    split: str

    @classmethod
    def parse(cls, source: str) -> HubDataset:
        """From `hf:NAME[:CONFIG[:SPLIT]]`; no config means the default one, no split means `train`."""
        parts = source.removeprefix(HUB_PREFIX).split(":")
        if not parts[0] or len(parts) > 3:
            raise UserError(f"{source!r} names no data set: write hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT")
        name, config, split = (parts + [""] * 3)[:3]
        return cls(name, config or None, split or "train")


def resolve(sources: Sequence[str | Path]) -> list[Path | HubDataset]:
    """The files and data sets that the sources name, folders walked in sorted order.

    In a folder, files that are hidden, empty, or end in none of `SUFFIXES` are passed over.

    Raises:
        UserError: no source at all, a path that does not exist, a file of an unknown kind, a folder with none
            to read.
    """
    if not sources:
        raise UserError("there are no sources: name text, JSONL or parquet files, folders, hf:NAME, or demo")
    return [found for source in sources for found in _resolve_one(source)]


def _resolve_one(source: str | Path) -> list[Path | HubDataset]:
    if source == DEMO:
        return [_demo_corpus()]
    if isinstance(source, str) and source.startswith(HUB_PREFIX):
        return [HubDataset.parse(source)]
    path = Path(source)
    if path.is_dir():
        if not (found := list(_walk(path))):
            raise UserError(f"{path} has no file to read, whose name ends in one of {', '.join(SUFFIXES)}")
        return found
    if not path.exists():
        raise UserError(f"{path} does not exist: name a file, a folder, hf:NAME for a Hugging Face data set, or demo")
    if not _is_readable(path):
        raise UserError(f"{path} is of an unknown kind: its name must end in one of {', '.join(SUFFIXES)}")
    return [path]


def _demo_corpus() -> Path:
    return Path(str(resources.files("peerlm") / "corpus" / "demo_corpus.txt.xz"))


def _walk(folder: Path) -> Iterator[Path | HubDataset]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(parent, name) for name in sorted(files) if not name.startswith(".")):
            if _is_readable(path) and path.stat().st_size > 0:
                yield path


def _is_readable(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def fingerprint(source: Path | HubDataset) -> dict[str, Any]:
    """What tells a changed source from an unchanged one, as JSON values.

    A file is known by its path, size and time of change; the embedded corpus by its content, since installing
    it gives it a new time; a Hugging Face data set by its name alone.
    """
    if isinstance(source, HubDataset):
        return {"dataset": source.name, "config": source.config, "split": source.split}
    if source == _demo_corpus():
        return {"path": DEMO, "sha256": hashlib.sha256(source.read_bytes()).hexdigest()}
    status = source.stat()
    return {"path": str(source.resolve()), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def read_documents(
    sources: Sequence[str | Path], *, text_field: str = "text", advance: Advance = lambda num_bytes: None
) -> Iterator[str]:
    """Stream the documents of the sources, one after another; no more than one document is held at a time.

    Args:
        sources: each one of: a text file (.txt; documents separated by lines `<|endoftext|>`, or the whole
            file one document), a .jsonl file, either of them compressed as .xz or .gz, a .parquet file, a
            folder of such files, `demo` for the embedded corpus, or `hf:NAME[:CONFIG[:SPLIT]]` for a Hugging
            Face data set.
        text_field: the JSON field or column that holds the text.
        advance: called now and then with the number of bytes on disk that were read since the last call.

    Yields:
        The text of each document; documents of white space alone are left out.

    Raises:
        UserError: a source that cannot be read or holds no text, with its file and line.
    """
    for source in resolve(sources):
        empty = True
        for text in _read_source(source, text_field, advance):
            if text and not text.isspace():
                empty = False
                yield text
        if empty:
            raise UserError(f"{_name(source)} holds no text: leave it out")


def _read_source(source: Path | HubDataset, text_field: str, advance: Advance) -> Iterator[str]:
    if isinstance(source, HubDataset):
        return read_hub(source.name, source.config, source.split, text_field)
    name = source.name.lower().removesuffix(".xz").removesuffix(".gz")
    if name.endswith(".parquet"):
        return read_parquet(source, text_field, advance)
    if name.endswith(".jsonl"):
        return read_jsonl(source, text_field, advance)
    return read_text(source, advance)


def _name(source: Path | HubDataset) -> str:
    return f"data set {source.name!r}" if isinstance(source, HubDataset) else str(source)
