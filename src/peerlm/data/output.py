"""A folder that is made from sources: the one that is there already, or a new one, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peerlm.data.manifest import FORMAT, MANIFEST_FILE, SPLITS, Manifest
from peerlm.data.request import difference
from peerlm.data.shards import TokenShards
from peerlm.data.tokenizer import load_tokenizer
from peerlm.data.workers import LostWorkerError
from peerlm.errors import UserError

log = logging.getLogger(__name__)
"""Says on stderr, unless logging is set up otherwise, what is not as asked for."""


def existing(output: Path, request: dict[str, Any]) -> Manifest | None:
    """The manifest of what this request has made before, or None where `output` is free.

    Raises:
        UserError: `output` is something else, was made by another request, or is damaged.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not (output / MANIFEST_FILE).is_file():
        raise UserError(f"{output} exists and holds something other than prepared data: choose another output")
    manifest = Manifest.read(output)
    for name in {**manifest.request, **request}:
        before, value = manifest.request.get(name), request.get(name)
        if before != value:
            raise UserError(
                f"{output} was prepared with {difference(name, before, value)}: choose another output, or delete it to "
                "prepare it again"
            )
    for split in SPLITS:
        TokenShards(output, split)
    load_tokenizer(output)
    say_old_split(output, manifest)
    return manifest


def say_old_split(folder: str | Path, manifest: Manifest) -> None:
    """Say so where the split of a prepared folder is of an older version."""
    if manifest.format == FORMAT and manifest.copies is None:
        log.warning(
            "%s was prepared by an older version: held-out documents may have copies in the training text that differ "
            "in white space or line ends. Delete the folder to prepare it again.",
            folder,
        )


RESUME = "resume"
"""Folder within a partial one: what is needed to resume."""
PROGRESS_FILE = "progress.json"


@contextmanager
def resumable(output: Path, request: dict[str, Any]) -> Iterator[Path]:
    """As `whole_or_not_at_all`, but a folder that has RESUME/progress.json is kept for the same request.

    So it is after a kill, and after any error that is none of the sources'.

    Raises:
        UserError: another process makes it.
    """
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:8]
    partial = output.with_name(f"{output.name}.partial-{digest}")
    partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial, output):
        if not (partial / RESUME / PROGRESS_FILE).is_file():
            _clear(partial)
            (partial / RESUME).mkdir()
        try:
            yield partial
            shutil.rmtree(partial / RESUME)
            partial.rename(output)
        except BaseException as error:
            wrong = isinstance(error, UserError) and not isinstance(error, LostWorkerError)
            if wrong or not (partial / RESUME / PROGRESS_FILE).is_file():
                shutil.rmtree(partial)
            else:
                log.warning("What is done is kept in %s: the same command resumes.", partial)
            raise


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def _locked(folder: Path, output: Path) -> Iterator[None]:
    """Lock a folder against other processes, as long as this one lives; not on systems without such locks."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process prepares {output} at this moment: wait for its end") from None
    else:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def whole_or_not_at_all(output: Path) -> Iterator[Path]:
    """A new folder beside `output` that takes its name when the context ends well, else is deleted."""
    partial = output.with_name(f"{output.name}.partial-{secrets.token_hex(4)}")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial)
        raise
