"""Files that are written whole or not at all, whenever the process or the machine dies."""

import ctypes
import errno
import json
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial-"
"""Prefix of what is being written; a leftover of it is rubbish."""
_CHUNK_BYTES = 2**22


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write into; on success it becomes `folder`, on an exception it is removed.

    The folder's files are on the disk before it takes its name. They are as readable as it is
    (safetensors writes files that only their owner may read). A `folder` that was there is replaced: on Linux in one
    step, elsewhere with a moment in between in which it has another name.
    """
    partial = folder.with_name(PARTIAL + folder.name)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in partial.rglob("*"):
            if not path.is_dir():
                path.chmod(partial.stat().st_mode & 0o666)
            sync(path)
        sync(partial)
        if folder.exists():
            _exchange(partial, folder)
        else:
            partial.replace(folder)
        sync(folder.parent)
        shutil.rmtree(partial, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_json(path: Path, values: object) -> None:
    """Write `path` as indented JSON, replacing it in one step."""
    write_bytes(path, (json.dumps(values, indent=2) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write `path`, replacing it in one step; what is there and no file, as a device is, is written into."""
    if path.exists() and not path.is_file() and not path.is_dir():
        path.write_bytes(content)
        return
    partial = path.with_name(PARTIAL + path.name)
    try:
        partial.write_bytes(content)
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def fingerprint(path: Path) -> dict[str, int]:
    """Size and CRC-32 of a file, as "bytes" and "crc32"."""
    checksum, size = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
            size += len(chunk)
    return {"bytes": size, "crc32": checksum}


def is_partial(path: Path) -> bool:
    """Whether a killed process left this half written."""
    return path.name.startswith(PARTIAL)


def remove_partials(folder: Path) -> None:
    """Remove what a killed process left half written directly in `folder`."""
    for path in folder.glob(PARTIAL + "*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def free_bytes(folder: Path) -> int:
    """Of the disk of a folder, which need not exist yet."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(there).free


def require_space(folder: Path, needed: int) -> None:
    """Raise an OSError for a full disk unless that many bytes are free."""
    free = free_bytes(folder)
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"{folder} needs {needed / 2**30:,.3g} GiB, and its disk has {free / 2**30:,.3g} GiB free"
        )


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception, or one it came from, says that the disk or the quota is full.

    Writers in native code report it in words alone.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(cause):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _exchange(new: Path, old: Path) -> None:
    """Let two folders swap their names."""
    if sys.platform == "linux":
        at_working_folder, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        names = (os.fsencode(new), os.fsencode(old))
        if rename and not rename(at_working_folder, names[0], at_working_folder, names[1], exchange):
            return
    aside = old.with_name(f"{PARTIAL}{old.name}-before")
    shutil.rmtree(aside, ignore_errors=True)
    old.replace(aside)
    new.replace(old)
    aside.replace(new)


def sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
