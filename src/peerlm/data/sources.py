"""Sources: what names a text, where its files are, and the stream of documents that they hold."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from peerlm.data.readers import Advance, read_hub, read_jsonl, read_parquet, read_text
from peerlm.data.text_files import JSONL, KINDS, PARQUET, check_file, file_kind, files_of, suffix_of, tally
from peerlm.errors import UserError

DEMO = "demo"
HUB_PREFIX = "hf:"

_SUFFIXES_SAID = f"{', '.join(KINDS)}; text and JSONL may be compressed as .xz or .gz"


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


@dataclass(frozen=True)
class Survey:
    """What the sources name, before anything is read."""

    found: list[Path | HubDataset]
    """The files and data sets, in the order in which they are read."""
    passed_over: Counter[str]
    """Numbers of files in folders that are not read, as `text_files.FolderFiles.passed_over`."""

    @property
    def read(self) -> Counter[str]:
        """Numbers of files that are read, by suffix; "data set" for those of Hugging Face."""
        return Counter(suffix_of(found) if isinstance(found, Path) else "data set" for found in self.found)


def resolve(sources: Sequence[str | Path]) -> list[Path | HubDataset]:
    """The files and data sets that the sources name; see `survey`."""
    return survey(sources).found


def survey(sources: Sequence[str | Path]) -> Survey:
    """The files and data sets that the sources name, and how many files of folders are passed over.

    Folders are walked as `text_files.files_of` does. A source named twice is read twice.

    Raises:
        UserError: no source at all, a path that does not exist or may not be read, a file of an unknown kind, a name
            that is not UTF-8, a folder with nothing to read.
    """
    if not sources:
        raise UserError("there are no sources: name text, JSONL or parquet files, folders, hf:NAME, or demo")
    result = Survey([], Counter())
    for source in sources:
        found, passed_over = _survey_one(source)
        result.found.extend(found)
        result.passed_over.update(passed_over)
    return result


def _survey_one(source: str | Path) -> tuple[Sequence[Path | HubDataset], Counter[str]]:
    if source == DEMO:
        return [_demo_corpus()], Counter()
    if isinstance(source, str) and source.startswith(HUB_PREFIX):
        return [HubDataset.parse(source)], Counter()
    path = Path(source)
    if path.is_dir():
        files = files_of(path)
        if not files.read:
            raise UserError(
                f"{path} has no file to read (passed over: {tally(files.passed_over)}): names must end in one of "
                f"{_SUFFIXES_SAID}"
            )
        return files.read, files.passed_over
    if not path.exists() and not path.is_symlink():
        raise UserError(f"{path} does not exist: name a file, a folder, hf:NAME for a Hugging Face data set, or demo")
    check_file(path)
    if file_kind(path) is None:
        raise UserError(
            f"{path} is of an unknown kind: its name must end in one of {_SUFFIXES_SAID}; rename plain text to .txt"
        )
    return [path], Counter()


def _demo_corpus() -> Path:
    return Path(str(resources.files("peerlm") / "corpus" / "demo_corpus.txt.xz"))


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
        sources: each one of: a text file (.txt, .md and others of `text_files.KINDS`; documents separated by lines
            `<|endoftext|>`, or the whole file one document), a .jsonl file, either of them compressed as .xz or .gz, a
            .parquet file, a folder of such files, `demo` for the embedded corpus, or `hf:NAME[:CONFIG[:SPLIT]]` for a
            Hugging Face data set.
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
    kind = file_kind(source)
    if kind == PARQUET:
        return read_parquet(source, text_field, advance)
    if kind == JSONL:
        return (text for (text,) in read_jsonl(source, (text_field,), advance))
    return read_text(source, advance)


def _name(source: Path | HubDataset) -> str:
    return f"data set {source.name!r}" if isinstance(source, HubDataset) else str(source)
