"""Files of text: which can be read, of what kind they are, and which of a folder are passed over."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from peerlm.errors import UserError, listed

TEXT, JSONL, PARQUET = "text", "jsonl", "parquet"
COMPRESSED = (".xz", ".gz")
KINDS = {
    **dict.fromkeys((".txt", ".text", ".md", ".markdown", ".rst", ".org", ".adoc", ".tex", ".tokens"), TEXT),
    **dict.fromkeys((".jsonl", ".ndjson"), JSONL),
    ".parquet": PARQUET,
}
"""What a file holds, by the suffix of its name; text and JSONL may be compressed, as in .txt.xz."""

_PACKED = (*COMPRESSED, ".zst", ".bz2", ".lz4", ".zip")


def file_kind(path: Path) -> Literal["text", "jsonl", "parquet"] | None:
    """What the file's name says that it holds; None where it ends in no known suffix."""
    name = path.name.lower()
    for suffix in COMPRESSED:
        if name.endswith(suffix):
            kind = KINDS.get(Path(name.removesuffix(suffix)).suffix)
            return None if kind == PARQUET else kind  # type: ignore[return-value]
    return KINDS.get(Path(name).suffix)  # type: ignore[return-value]


def suffix_of(path: Path) -> str:
    """The suffix by which files are counted: both of `a.jsonl.zst`; "no suffix" where there is none."""
    name = Path(path.name.lower())
    packed = name.suffix if name.suffix in _PACKED else ""
    return Path(name.name.removesuffix(packed)).suffix + packed or "no suffix"


def check_name(path: Path) -> None:
    """Raise UserError unless the path, with all links followed, is UTF-8: it goes into manifests and tables."""
    for name in (path, path.resolve()):
        try:
            str(name).encode()
        except UnicodeEncodeError as error:
            shown = os.fsencode(name).decode("utf-8", "backslashreplace")
            raise UserError(f"the file name {shown} is not UTF-8: rename the file or folder") from error


def check_file(path: Path) -> None:
    """Raise UserError unless the path is a file that may be read, with a name that can be written down."""
    check_name(path)
    status = _status(path)
    if status is None:
        raise UserError(f"{path} does not exist: correct the path")
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is not a file (text is read more than once): write the text to a file, and name that")
    _check_access(path)


def _status(path: Path) -> os.stat_result | None:
    """Of the file that the path leads to, None where there is nothing; UserError where a link leads to nothing."""
    try:
        return path.stat()
    except OSError as error:
        if path.is_symlink():
            target = os.fsencode(path.readlink()).decode("utf-8", "backslashreplace")
            raise UserError(
                f"{path} is a link to {target}, which is not there: restore it or remove the link"
            ) from error
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return None
        raise UserError(f"{path} cannot be opened ({error.strerror}): correct the path or its permissions") from error


def _check_access(path: Path) -> None:
    mode = os.R_OK | os.X_OK if path.is_dir() else os.R_OK
    if not os.access(path, mode):
        raise UserError(f"{path} may not be read by this user: change its permissions, or leave it out")


@dataclass(frozen=True)
class FolderFiles:
    """What a folder holds."""

    read: list[Path] = field(default_factory=list)
    """Files to read, those of a folder before those of its subfolders, each in sorted order."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """Number of other files by suffix, or by the reason: hidden, empty, not a file, link to a parent, read already."""


def files_of(folder: Path) -> FolderFiles:
    """The files of a folder and its subfolders, links followed; each file and folder once.

    Skipped, and counted, are names that begin with a point (a hidden folder counts as one), files of no known suffix,
    and empty files. So are pipes, sockets and devices, links to a folder that contains this one, and files that were
    found already.

    Raises:
        UserError: a link that leads to nothing, a file or folder that may not be read, a file to read whose name is not
            UTF-8.
    """
    found = FolderFiles()
    _walk(folder, found, set())
    return found


def _walk(folder: Path, found: FolderFiles, seen: set[str]) -> None:
    _check_access(folder)
    here = Path(os.path.realpath(folder))
    seen.add(str(here))
    subfolders = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            found.passed_over["hidden"] += 1
            continue
        status = _status(path)
        if status is None:  # removed since the folder was listed
            continue
        if stat.S_ISDIR(status.st_mode):
            subfolders.append(path)
        elif reason := _reason_to_pass(path, status, seen):
            found.passed_over[reason] += 1
        else:
            check_file(path)
            found.read.append(path)
            seen.add(os.path.realpath(path))
    for path in subfolders:
        real = Path(os.path.realpath(path))
        if real == here or real in here.parents:
            found.passed_over["link to a parent"] += 1
        elif str(real) in seen:
            found.passed_over["read already"] += 1
        else:
            _walk(path, found, seen)


def _reason_to_pass(path: Path, status: os.stat_result, seen: set[str]) -> str:
    """Why a file of a folder is not read; empty where it is."""
    if not stat.S_ISREG(status.st_mode):
        return "not a file"
    if file_kind(path) is None:
        return suffix_of(path)
    if not status.st_size:
        return "empty"
    return "read already" if os.path.realpath(path) in seen else ""


def tally(counts: Mapping[str, int]) -> str:
    """Numbers of files by name in words, the most frequent first: "12 .png, 3 hidden"; "none" without any."""
    return listed(f"{number:,} {name}" for name, number in Counter(counts).most_common())
