"""The manifest of a prepared folder: what it holds, what it was made from, and the hash of every file.

A prepared folder looks like this (`heldout-` files as `train-` files):

    manifest.json                   this
    tokenizer/tokenizer.json ...    a tokenizer that transformers can load
    train-00000.bin, ...            token ids, little-endian uint16 or uint32; a document may run on into the
    next shard train-ends.bin                  little-endian uint64, one per document: the number of tokens up
    to its end
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peerlm.errors import UserError

FORMAT = 1
MANIFEST_FILE = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
SPLITS = ("train", "heldout")
TOKEN_DTYPES = ("<u2", "<u4")
END_DTYPE = "<u8"


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One array on disk."""

    file: str
    """Name inside the prepared folder."""
    items: int
    """Number of tokens (shards) or documents (document ends)."""
    sha256: str
    """Hash of the file's bytes, in hexadecimal."""


@dataclass(frozen=True, kw_only=True)
class SplitRecord:
    """One side of the split."""

    documents: int
    """Number of documents."""
    tokens: int
    """Number of tokens, the end-of-text token of each document included."""
    bytes: int
    """UTF-8 bytes of the text, the denominator of bits per byte; end-of-text tokens count nothing."""
    shards: tuple[FileRecord, ...]
    """The tokens, in order."""
    ends: FileRecord
    """The document ends."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that is known of a prepared folder."""

    format: int
    """Version of this layout."""
    request: dict[str, Any]
    """The arguments of `prepare` and a fingerprint of each source: equal requests make equal folders."""
    vocab_size: int
    """Token ids are below this; less than was asked for where the text is too short to learn that many."""
    eos_token_id: int
    """The end-of-text token that closes each document."""
    dtype: str
    """numpy name of the tokens' type: `<u2` or `<u4`."""
    tokenizer_sha256: str
    """Hash of tokenizer/tokenizer.json."""
    splits: dict[str, SplitRecord]
    """`train` and `heldout`."""
    files: dict[str, dict[str, int]] | None = None
    """Numbers of files by suffix or reason: those "read", and those of folders "passed_over"; see `sources.Survey`."""
    copies: int | None = None
    """Documents that are copies of another but for white space and the like (see `split.copy_key`); all copies of a
    document lie in one split. None in a folder of an older version, which knew only copies of equal bytes."""

    def write(self, folder: Path) -> None:
        """Write `manifest.json` into the folder."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: str | Path) -> Manifest:
        """Read and check a prepared folder's manifest; raises `UserError` where it is absent or corrupt."""
        path = Path(folder) / MANIFEST_FILE
        if not path.is_file():
            raise UserError(f"{folder} holds no prepared data (no {MANIFEST_FILE}): run `peerlm prepare` to make it")
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            found = fields["format"]
            if found == FORMAT:
                return cls._from_fields(fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{path} is corrupt ({reason}): delete the folder and prepare it again") from error
        raise UserError(f"{path} has format {found!r}, this version reads format {FORMAT}: prepare the folder again")

    @classmethod
    def _from_fields(cls, fields: Mapping[str, Any]) -> Manifest:
        splits = {
            name: SplitRecord(
                **{
                    **split,
                    "shards": tuple(FileRecord(**shard) for shard in split["shards"]),
                    "ends": FileRecord(**split["ends"]),
                }
            )
            for name, split in fields["splits"].items()
        }
        manifest = cls(**{**fields, "splits": splits})
        if tuple(splits) != SPLITS:
            raise ValueError(f"splits are {tuple(splits)}, not {SPLITS}")
        if manifest.dtype not in TOKEN_DTYPES:
            raise ValueError(f"dtype is {manifest.dtype!r}, not one of {TOKEN_DTYPES}")
        for name, split in splits.items():
            if sum(shard.items for shard in split.shards) != split.tokens or split.ends.items != split.documents:
                raise ValueError(f"the files of split {name!r} do not add up to its totals")
        return manifest


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; reads it in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
