"""Write one split of a prepared folder: token shards and document ends, hashed as they are written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from peerlm.data.manifest import END_DTYPE, FileRecord, SplitRecord


class SplitWriter:
    """A context in which a split's documents are written, in order and in parts of any length.

    Args:
        folder: an existing folder.
        split: `"train"` or `"heldout"`, the start of the file names.
        dtype: numpy name of the tokens' type.
        shard_tokens: most tokens in one shard; a document runs on into the next.
        position: where to resume, as `save` returned it; what was written after that is cut off.
    """

    def __init__(
        self, folder: Path, split: str, dtype: str, shard_tokens: int, position: Mapping[str, int] | None = None
    ) -> None:
        self._folder, self._split, self._dtype, self._shard_tokens = folder, split, dtype, shard_tokens
        self._files = ExitStack()
        at = position or {"documents": 0, "tokens": 0, "bytes": 0}
        self._tokens, self._bytes = at["tokens"], at["bytes"]
        self._ends = self._open(f"{split}-ends.bin", END_DTYPE, at["documents"])
        self._shards: list[_ArrayFile] = []
        for start in range(0, self._tokens, shard_tokens):
            self._add_shard(min(shard_tokens, self._tokens - start))

    def save(self) -> dict[str, int]:
        """Put on disk what was written, and say where to resume."""
        for file in (self._ends, *self._shards[-1:]):  # full ones were put there when the next began
            file.sync()
        return {"documents": self._ends.items, "tokens": self._tokens, "bytes": self._bytes}

    def append(self, tokens: npt.NDArray[np.integer]) -> None:
        """Add tokens, (num_tokens,) of any integer type, to the document being written."""
        start = 0
        while start < len(tokens):
            filled = self._tokens % self._shard_tokens
            if filled == 0:
                if self._shards:
                    self._shards[-1].sync()
                self._add_shard(0)
            part = tokens[start : start + self._shard_tokens - filled]
            self._shards[-1].append(part)
            self._tokens += len(part)
            start += len(part)

    def end_document(self, num_bytes: int) -> None:
        """Close the document being written, whose text has this many UTF-8 bytes."""
        self._ends.append(np.array([self._tokens]))
        self._bytes += num_bytes

    def finish(self) -> SplitRecord:
        """Put everything on disk and describe it."""
        self._files.close()
        return SplitRecord(
            documents=self._ends.items,
            tokens=self._tokens,
            bytes=self._bytes,
            shards=tuple(shard.record() for shard in self._shards),
            ends=self._ends.record(),
        )

    def _add_shard(self, items: int) -> None:
        self._shards.append(self._open(f"{self._split}-{len(self._shards):05d}.bin", self._dtype, items))

    def _open(self, name: str, dtype: str, items: int) -> _ArrayFile:
        return self._files.enter_context(_ArrayFile(self._folder / name, dtype, items))

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()


class _ArrayFile:
    """An array on disk that grows at its end; of one that is there, the first `items` are kept."""

    def __init__(self, path: Path, dtype: str, items: int = 0) -> None:
        self.items = items
        self._path, self._dtype = path, dtype
        self._digest = hashlib.sha256()
        self._file = path.open("r+b" if items else "wb")
        left = self._file.truncate(items * np.dtype(dtype).itemsize)
        while left:
            block = self._file.read(min(left, 1 << 20))
            self._digest.update(block)
            left -= len(block)

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def append(self, values: npt.NDArray[np.integer]) -> None:
        data = values.astype(self._dtype).tobytes()
        self._digest.update(data)
        self._file.write(data)
        self.items += len(values)

    def record(self) -> FileRecord:
        return FileRecord(file=self._path.name, items=self.items, sha256=self._digest.hexdigest())

    def __enter__(self) -> _ArrayFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            self.sync()
