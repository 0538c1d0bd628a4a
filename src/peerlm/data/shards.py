"""Prepared token shards: memory-mapped, checked when opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from peerlm.data.manifest import END_DTYPE, SPLITS, FileRecord, Manifest, sha256_of
from peerlm.errors import UserError


class TokenShards:
    """One split of a prepared folder, read as a single sequence of tokens.

    Args:
        folder: what `prepare` wrote.
        split: `"train"` or `"heldout"`.
        verify: also compare the hash of every file of the split with the manifest's, which reads them all.

    Raises:
        UserError: an absent or corrupt manifest, an unknown split, a shard that is missing, too short or too
            long, or (with `verify`) whose bytes are not those that were written.
    """

    folder: Path
    split: str
    manifest: Manifest
    num_tokens: int
    """Tokens of the split, the marks of each document included."""
    num_bytes: int | None
    """UTF-8 bytes of the text that these tokens stand for; None for tokens of others, whose text is not known."""
    vocab_size: int
    """Token ids are below this."""
    eos_token_id: int
    window_start: tuple[int, ...]
    """Tokens that every window begins with; see `peerlm.marks`."""
    document_ends: npt.NDArray[np.uint64]
    """(num_documents,) uint64, memory-mapped: document d ends before token document_ends[d]."""

    def __init__(self, folder: str | Path, split: str, *, verify: bool = False) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        if split not in SPLITS:
            raise UserError(f"there is no split {split!r}: choose one of {', '.join(SPLITS)}")
        self.split = split
        record = self.manifest.splits[split]
        self.num_tokens = record.tokens
        self.num_bytes = record.bytes
        self.vocab_size = self.manifest.vocab_size
        self.eos_token_id = self.manifest.eos_token_id
        self.window_start = self.manifest.document_start
        self._mapped: dict[Path, npt.NDArray[np.uint8]] = {}
        self.document_ends = self._map(record.ends, END_DTYPE, verify)
        self._shards = [self._map(shard, self.manifest.dtype, verify) for shard in record.shards]
        self._starts = np.cumsum([0] + [shard.items for shard in record.shards])

    def _map(self, record: FileRecord, dtype: str, verify: bool) -> npt.NDArray[Any]:
        path = self.folder / record.file
        fix = "prepare the folder again or restore the file"
        if not path.is_file():
            raise UserError(f"{path} is missing: {fix}")
        dtype = record.dtype or dtype
        num_bytes, found = record.items * np.dtype(dtype).itemsize, path.stat().st_size
        expected = num_bytes if record.file_bytes is None else record.file_bytes
        if found != expected:
            raise UserError(f"{path} has {found} bytes, not the {expected} that the manifest says: {fix}")
        if not record.items:  # an empty file cannot be mapped
            return np.empty(0, dtype)
        if path not in self._mapped:
            self._mapped[path] = np.memmap(path, np.uint8, mode="r")
        items = self._mapped[path][record.offset : record.offset + num_bytes]
        if verify and sha256_of(items) != record.sha256:
            raise UserError(f"{path} does not have the hash that the manifest says, so its content has changed: {fix}")
        return items.view(dtype)

    def tokens(self, start: int, stop: int) -> npt.NDArray[np.unsignedinteger]:
        """Tokens `start` up to `stop` of the split, across shards: (stop - start,) uint16 or uint32, a copy.

        Raises `IndexError` unless 0 <= start <= stop <= num_tokens.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} do not lie within 0 to {self.num_tokens}")
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        last = int(np.searchsorted(self._starts, stop, side="left"))
        parts = [
            self._shards[shard][max(start - base, 0) : stop - base]
            for shard in range(first, last)
            for base in [int(self._starts[shard])]
        ]
        dtype = self.manifest.dtype
        return np.concatenate(parts).astype(dtype, copy=False) if parts else np.empty(0, dtype)

    def __reduce__(self) -> tuple[type[TokenShards], tuple[Path, str]]:
        """Pickle as folder and split: a spawned worker maps the files and is not sent their content."""
        return TokenShards, (self.folder, self.split)
