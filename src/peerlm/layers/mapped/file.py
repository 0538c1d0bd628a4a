"""A tensor in a mapped file: the system's page cache holds the pages in use, and any process may share them.

The file is a safetensors file whose numbers begin at a page. Pages that were used lately are remembered, so that those
that were not can be given back first.
"""

import ctypes
import mmap
import os
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peerlm.errors import UserError
from peerlm.files import sync
from peerlm.ops.tensor_files import head_of, num_bytes, write_at

PAGE = mmap.ALLOCATIONGRANULARITY
HEAD = 4096
"""Bytes before the numbers."""
REGION = 1 << 26
"""Bytes of a file of which pages are given back at once."""
_SCATTERED = 64
"""Rows of at least so many bytes are read one at a time, without what lies behind them."""
_READERS = 16
_WORTH_READING_AHEAD = 64
"""Pages that several threads ask the disk for."""


class MappedFile:
    """One tensor (N, ...) in a file; `tensor` shares its memory.

    Args:
        path: a file that `create` made, or a longer one.
        shape, dtype: of the tensor.

    Raises:
        UserError: there is no such file, or it is too short.
    """

    def __init__(self, path: Path, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.path, self.shape, self.dtype = path, tuple(shape), dtype
        self.num_bytes = num_bytes(shape, dtype)
        try:
            self._descriptor = os.open(path, os.O_RDWR)
        except FileNotFoundError as error:
            raise UserError(f"the file {path} with rows of a table is missing: restore it, or start again") from error
        weakref.finalize(self, os.close, self._descriptor)
        found = os.fstat(self._descriptor).st_size
        if found < HEAD + self.num_bytes:
            raise UserError(
                f"the file {path} has {found:,} bytes, and a table of shape {self.shape} in {dtype} takes "
                f"{HEAD + self.num_bytes:,}: restore it, or start again"
            )
        self._map = mmap.mmap(self._descriptor, HEAD + self.num_bytes)
        count = self.shape[0] if self.shape else 0
        self.row_bytes = self.num_bytes // max(1, count)
        if self.row_bytes >= _SCATTERED:
            self._map.madvise(mmap.MADV_RANDOM)
        if self.num_bytes:
            flat = torch.frombuffer(self._map, dtype=torch.uint8, offset=HEAD)
            self.bytes = flat.view(count, self.row_bytes)
            self.tensor = flat.view(dtype).view(self.shape)
        else:
            self.bytes = torch.empty(count, 0, dtype=torch.uint8, device="cpu")
            self.tensor = torch.empty(self.shape, dtype=dtype, device="cpu")
        self._in_large_pieces: set[int] = set()
        """Regions that `write` has written: the system keeps, writes and drops their pages many at a time."""
        self.recent = torch.zeros(-(-(HEAD + self.num_bytes) // PAGE), dtype=torch.bool, device="cpu")

    @classmethod
    def create(cls, path: Path, shape: Sequence[int], dtype: torch.dtype) -> "MappedFile":
        """A new file of zeros, which takes no room on the disk yet; one that was there keeps its memory, not its name.

        Raises OSError where the file cannot be made.
        """
        partial = path.with_name(path.name + ".new")
        with partial.open("wb") as file:
            file.write(head_of("rows", shape, dtype, length=HEAD))
            file.truncate(HEAD + num_bytes(shape, dtype))
        sync(partial)
        partial.replace(path)
        return cls(path, shape, dtype)

    def with_length(self, count: int) -> "MappedFile":
        """The same file with so many rows, new ones of zeros behind those that stay; `self` must not be used again."""
        shape = (count, *self.shape[1:])
        os.truncate(self.path, HEAD + num_bytes(shape, self.dtype))
        self._name("rows", shape)
        return MappedFile(self.path, shape, self.dtype)

    def _name(self, name: str, shape: Sequence[int]) -> None:
        os.pwrite(self._descriptor, head_of(name, shape, self.dtype, length=HEAD), 0)

    def link(self, path: Path, name: str) -> bool:
        """Let `path` be a safetensors file that has the tensor by this name: the same file, where that can be.

        Returns whether it is; else nothing is done. The tensor must not change afterwards.
        """
        head = head_of(name, self.shape, self.dtype, length=HEAD)
        if len(head) != HEAD:
            return False
        self.flush()
        try:
            os.link(self.path, path)
        except OSError:  # on another disk
            return False
        self._name(name, self.shape)
        return True

    def flush(self) -> None:
        """Wait until all changes are on the disk."""
        self._map.flush()
        os.fsync(self._descriptor)

    @property
    def missing_bytes(self) -> int:
        """Room on the disk that the file does not take yet, and will when all of it was written."""
        return max(0, HEAD + self.num_bytes - 512 * os.fstat(self._descriptor).st_blocks)

    def use(self, ids: Tensor) -> int:
        """Have the rows `ids` (int64, any shape) in memory, read from the disk by several threads; the bytes read."""
        for begin in sorted(self._in_large_pieces):  # or a change of a row would write megabytes
            self.give_back(begin)
        first = (ids.reshape(-1) * self.row_bytes + HEAD) // PAGE
        last = (ids.reshape(-1) * self.row_bytes + (HEAD + self.row_bytes - 1)) // PAGE
        pages = torch.cat([first, last[last != first]])
        new = pages[~self.recent[pages]].unique()
        self.recent[new] = True
        if len(new) >= _WORTH_READING_AHEAD:
            places = (new * PAGE - HEAD).clamp_(min=0)
            flat = self.bytes.view(-1)
            list(_readers().map(lambda part: int(flat[part].sum()), places.chunk(_READERS)))
        return len(new) * PAGE

    def write(self, first: int, values: Tensor) -> None:
        """Let rows first, first + 1, ... be these (count, ...) of the file's dtype, without reading what was there.

        The disk then writes them in order; through the map it would get a page at a time. Raises OSError where it is
        full.
        """
        begin = HEAD + first * self.row_bytes
        write_at(self._descriptor, values, begin)
        self._in_large_pieces.update(range(begin // REGION * REGION, begin + values.nbytes, REGION))

    def expect(self, first: int, count: int) -> None:
        """Have the disk begin to read rows first, first + 1, ..., which are read in order next."""
        begin = (HEAD + first * self.row_bytes) // PAGE * PAGE
        end = min(HEAD + (first + count) * self.row_bytes, HEAD + self.num_bytes)
        if end > begin:
            self._map.madvise(mmap.MADV_WILLNEED, begin, end - begin)

    def resident_bytes(self) -> int:
        """How much of the file is in memory."""
        return int(self._resident(0, len(self._map)).sum()) * PAGE

    def _resident(self, begin: int, length: int) -> Tensor:
        """Of each page whether it is in memory; a byte each."""
        pages = -(-length // PAGE)
        found = torch.zeros(pages, dtype=torch.uint8, device="cpu")
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._map)) + begin
        if libc().mincore(ctypes.c_void_p(address), ctypes.c_size_t(length), ctypes.c_void_p(found.data_ptr())):
            raise OSError(ctypes.get_errno(), "mincore")
        return found & 1

    def give_back(self, begin: int) -> int:
        """Write a region's changes, and free its pages that were not used since it was last asked; the bytes freed.

        All of its pages, used or not, where they can only be freed together.
        """
        length = min(REGION, len(self._map) - begin)
        part = slice(begin // PAGE, begin // PAGE + -(-length // PAGE))
        idle = self._resident(begin, length).bool()
        if begin in self._in_large_pieces:
            self._in_large_pieces.remove(begin)
        else:
            idle &= ~self.recent[part]
        self.recent[part] = False
        if not idle.any():
            return 0
        self._map.flush(begin, length)
        edges = torch.diff(idle.int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int))
        starts, ends = (edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist()
        for start, end in zip(starts, ends, strict=True):
            offset, size = begin + start * PAGE, (end - start) * PAGE
            self._map.madvise(mmap.MADV_DONTNEED, offset, min(size, len(self._map) - offset))
            os.posix_fadvise(self._descriptor, offset, size, os.POSIX_FADV_DONTNEED)
        return int(idle.sum()) * PAGE


@cache
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_READERS, thread_name_prefix="rows")


@cache
def libc() -> Any:
    """The system's C library."""
    return ctypes.CDLL(None, use_errno=True)
