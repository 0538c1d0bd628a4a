"""A log of rows as they were before they changed: on the disk before the change, so that it can be taken back.

A record is MAGIC, the lengths of its head and content, the CRC-32 of both, the head (JSON: the record's number in the
file, how many rows, bytes of a row by name) and the content (ids as int64, then the rows of each name).
"""

import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from peerlm.errors import UserError
from peerlm.files import sync

MAGIC = b"PEERUNDO"
_LENGTHS = struct.Struct("<8sQQI")


class UndoLog:
    """Appends records to a file, which is made with the first one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._records = 0

    def append(self, ids: Tensor, rows: Mapping[str, Tensor]) -> None:
        """Write how these rows are, and wait until it is on the disk.

        ids: (U,) int64; rows: by name (U, bytes) uint8.
        """
        sizes = {name: values.shape[1] for name, values in rows.items()}
        head = json.dumps({"number": self._records, "rows": len(ids), "bytes": sizes}).encode()
        parts = [_as_bytes(each) for each in (ids, *rows.values())]
        checksum = zlib.crc32(head)
        for part in parts:
            checksum = zlib.crc32(part, checksum)
        lengths = _LENGTHS.pack(MAGIC, len(head), sum(map(len, parts)), checksum)
        descriptor = self._descriptor
        if descriptor is None:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_EXCL, 0o666)
            self._descriptor = descriptor
        for part in (memoryview(lengths + head), *parts):
            _write(descriptor, part)
        os.fdatasync(descriptor)
        if not self._records:
            sync(self.path.parent)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        self._records += 1

    def close(self) -> None:
        """Nothing is appended any more."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def read_undo(path: Path) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """The records of a log: ids and rows as of `UndoLog.append`.

    The last record may be incomplete: its writer was killed before it changed these rows. Raises UserError where a
    record is damaged that others follow.
    """
    with path.open("rb") as file:
        number = 0
        while True:
            begin = file.tell()
            lengths = file.read(_LENGTHS.size)
            content = None
            if len(lengths) == _LENGTHS.size:
                magic, head_length, content_length, checksum = _LENGTHS.unpack(lengths)
                if magic == MAGIC and head_length + content_length <= path.stat().st_size - file.tell():
                    head, content = file.read(head_length), bytearray(file.read(content_length))
                    if zlib.crc32(content, zlib.crc32(head)) != checksum or json.loads(head)["number"] != number:
                        content = None
            if content is None:
                file.seek(begin + 1)
                if _another_follows(file.read(1 << 30), number + 1):
                    raise UserError(
                        f"{path} is damaged: rows cannot be brought back to the checkpoint, so start the run again"
                    )
                return
            yield _rows_of(json.loads(head), content)
            number += 1


def _another_follows(rest: bytes, number: int) -> bool:
    """Whether there is a whole record after a damaged one."""
    place = rest.find(MAGIC)
    while place >= 0:
        if len(rest) - place >= _LENGTHS.size:
            _, head_length, content_length, checksum = _LENGTHS.unpack_from(rest, place)
            begin = place + _LENGTHS.size
            record = rest[begin : begin + head_length + content_length]
            if len(record) == head_length + content_length and zlib.crc32(record) == checksum:
                return bool(json.loads(record[:head_length])["number"] >= number)
        place = rest.find(MAGIC, place + 1)
    return False


def _rows_of(head: dict[str, dict[str, int]], content: bytearray) -> tuple[Tensor, dict[str, Tensor]]:
    flat = torch.frombuffer(content, dtype=torch.uint8)
    count = int(head["rows"])  # type: ignore[call-overload]
    ids, place, rows = flat[: 8 * count].view(torch.int64), 8 * count, {}
    for name, size in head["bytes"].items():
        rows[name] = flat[place : place + count * size].view(count, size)
        place += count * size
    return ids, rows


def _as_bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _write(descriptor: int, content: memoryview) -> None:
    while content:
        content = content[os.write(descriptor, content) :]
