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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy.typing as npt

from peerlm.errors import UserError

FORMAT = 1
OPENED_FORMAT = 2
"""That of a folder whose tokens lie in files of others; see `data.opening`."""
MANIFEST_FILE = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
SPLITS = ("train", "heldout")
TOKEN_DTYPES = ("<u2", "<u4")
END_DTYPE = "<u8"


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One array on disk."""

    file: str
    """Name inside the prepared folder, or the path of a file of others."""
    items: int
    """Number of tokens (shards) or documents (document ends)."""
    sha256: str
    """Hash of these items' bytes, in hexadecimal."""
    offset: int = 0
    """Bytes of the file before them."""
    dtype: str | None = None
    """numpy name of the items' type where it is not that of the folder."""
    file_bytes: int | None = None
    """Bytes of the whole file, where it holds more than these items."""


@dataclass(frozen=True, kw_only=True)
class SplitRecord:
    """One side of the split."""

    documents: int
    """Number of documents."""
    tokens: int
    """Number of tokens, the marks of each document included."""
    bytes: int | None
    """UTF-8 bytes that the tokens stand for, the denominator of bits per byte; marks count nothing. None for tokens of
    others, whose text is not known."""
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
    """The end-of-text token."""
    dtype: str
    """numpy name of the tokens' type: `<u2` or `<u4`."""
    tokenizer_sha256: str
    """Hash of tokenizer/tokenizer.json."""
    splits: dict[str, SplitRecord]
    """`train` and `heldout`."""
    document_start: tuple[int, ...] = ()
    """Tokens before each document, which begin every window, too; empty where one end-of-text token parts documents."""
    document_end: tuple[int, ...] | None = None
    """Tokens after each document; None: the end-of-text token."""
    lost: dict[str, float] = field(default_factory=dict)
    """Share of the text's bytes that tokens do not stand for, by reason; see `data.text_loss`."""
    files: dict[str, dict[str, int]] | None = None
    """Numbers of files by suffix or reason: those "read", and those of folders "passed_over"; see `sources.Survey`."""
    copies: int | None = None
    """Documents that are copies of another but for white space and the like (see `split.copy_key`); all copies of a
    document lie in one split. None in a folder of an older version, which knew only copies of equal bytes."""

    def write(self, folder: Path) -> None:
        """Write `manifest.json` into the folder."""
        values = asdict(self)
        for split in values["splits"].values():
            for record in (*split["shards"], split["ends"]):
                for name in ("offset", "dtype", "file_bytes"):
                    if not record[name]:
                        del record[name]
        text = json.dumps(values, indent=2, ensure_ascii=False)
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
            if found in (FORMAT, OPENED_FORMAT):
                return cls._from_fields(fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{path} is corrupt ({reason}): delete the folder and prepare it again") from error
        known = f"{FORMAT} and {OPENED_FORMAT}"
        raise UserError(f"{path} has format {found!r}, this version reads {known}: prepare the folder again")

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
        marks = {
            name: tuple(fields[name]) for name in ("document_start", "document_end") if fields.get(name) is not None
        }
        manifest = cls(**{**fields, "splits": splits, **marks})
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


def sha256_of(values: npt.NDArray[Any]) -> str:
    """SHA-256 of an array's bytes, in hexadecimal; reads it in blocks."""
    digest = hashlib.sha256()
    for start in range(0, len(values), 1 << 20):
        digest.update(values[start : start + (1 << 20)].tobytes())
    return digest.hexdigest()
