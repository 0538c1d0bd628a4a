"""Text to token shards: two passes over the sources, the result all or nothing."""

from __future__ import annotations

import heapq
import secrets
import shutil
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from peerlm.data.manifest import (
    FORMAT,
    MANIFEST_FILE,
    SPLITS,
    TOKEN_DTYPES,
    TOKENIZER_FOLDER,
    Manifest,
    SplitRecord,
    file_sha256,
)
from peerlm.data.shards import TokenShards
from peerlm.data.sources import HubDataset, fingerprint, read_documents, resolve
from peerlm.data.split import choose_heldout, document_key
from peerlm.data.tokenizer import (
    MIN_VOCAB_SIZE,
    encoder,
    load_tokenizer,
    open_tokenizer,
    pieces,
    tokenizer_file,
    train_tokenizer,
)
from peerlm.data.writer import SplitWriter
from peerlm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BATCH_CHARACTERS = 2**21


def prepare(
    sources: Sequence[str | Path],
    output: str | Path,
    *,
    tokenizer: str | Path | None = None,
    vocab_size: int = 4096,
    holdout: float = 0.02,
    seed: int = 0,
    text_field: str = "text",
    shard_tokens: int = 2**26,
    tokenizer_bytes: int = 2**26,
    progress: bool = True,
) -> Manifest:
    """Turn text into a folder of token shards with a tokenizer, a held-out split and a manifest.

    The first pass over the sources finds the size and keyed hash of each document, and keeps a random sample
    of the text from which the tokenizer is learned; the second tokenizes. Memory holds the sample, one batch,
    and about 80 bytes per document. The folder appears under its name when it is complete. When it is there
    already, made from the same sources with the same arguments, it is left as it is and its manifest
    returned. A process killed halfway leaves a folder OUTPUT.partial-..., which may be deleted.

    Args:
        sources: see `read_documents`.
        output: the folder to make; its parents are made too.
        tokenizer: a tokenizer.json or a folder with one; None learns one from the training documents.
        vocab_size: tokens of the vocabulary to learn, at least 257; of no effect with `tokenizer`.
        holdout: share of the text to hold out, within (0, 1); see `split.choose_heldout`.
        seed: key of the choice of held-out documents, 0 or more.
        text_field: the JSON field or parquet column that holds the text.
        shard_tokens: most tokens in one shard.
        tokenizer_bytes: UTF-8 bytes of text to learn the tokenizer from, a random sample of documents; of no
            effect with `tokenizer`.
        progress: show progress, speed and time left on stderr.

    Raises:
        UserError: a source that cannot be read or holds no text (with file and line), fewer than two distinct
            documents, an argument out of range, a tokenizer that cannot be read, or an `output` that exists
            and is something else.
    """
    _check_ranges(vocab_size if tokenizer is None else None, holdout, seed, shard_tokens, tokenizer_bytes)
    given = None if tokenizer is None else open_tokenizer(tokenizer)
    found = resolve(sources)
    request = {
        "sources": [fingerprint(source) for source in found],
        "text_field": text_field,
        "holdout": holdout,
        "seed": seed,
        "shard_tokens": shard_tokens,
        "tokenizer": None if tokenizer is None else file_sha256(tokenizer_file(tokenizer)),
        "vocab_size": vocab_size if tokenizer is None else None,
        "tokenizer_bytes": tokenizer_bytes if tokenizer is None else None,
    }
    output = Path(output).resolve()
    if (existing := _existing(output, request)) is not None:
        return existing

    with _whole_or_not_at_all(output) as folder, _progress_bar(progress) as bar:
        scan = _scan(sources, text_field, seed, 0 if given else tokenizer_bytes, _bytes_on_disk(found), bar)
        heldout = choose_heldout(scan.keys, scan.sizes, holdout)
        used = given or _learn(scan, heldout, vocab_size, tokenizer_bytes, bar)
        used.save_pretrained(folder / TOKENIZER_FOLDER)
        largest_id = max(used.get_vocab().values())
        dtype = TOKEN_DTYPES[0] if largest_id < 2**16 else TOKEN_DTYPES[1]
        with ExitStack() as open_files:
            writers = {
                split: open_files.enter_context(SplitWriter(folder, split, dtype, shard_tokens)) for split in SPLITS
            }
            _encode(
                _pieces(read_documents(sources, text_field=text_field), seed, heldout),
                used,
                writers,
                scan,
                bar,
            )
            splits = {split: writer.finish() for split, writer in writers.items()}
        _check_unchanged(splits, scan)
        manifest = Manifest(
            format=FORMAT,
            request=request,
            vocab_size=largest_id + 1,
            eos_token_id=used.eos_token_id,
            dtype=dtype,
            tokenizer_sha256=file_sha256(tokenizer_file(folder / TOKENIZER_FOLDER)),
            splits=splits,
        )
        manifest.write(folder)
    return manifest


def _check_ranges(vocab_size: int | None, holdout: float, seed: int, shard_tokens: int, tokenizer_bytes: int) -> None:
    if vocab_size is not None and vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"vocab_size is {vocab_size}: it must be at least {MIN_VOCAB_SIZE}, for the 256 bytes and the end of text"
        )
    if not 0 < holdout < 1:
        raise UserError(f"holdout is {holdout}: it must lie between 0 and 1, both excluded, such as 0.02 for 2%")
    if not 0 <= seed < 2**64:
        raise UserError(f"seed is {seed}: it must be 0 or more and below 2**64")
    if shard_tokens < 1 or tokenizer_bytes < 1:
        raise UserError(f"shard_tokens and tokenizer_bytes must be 1 or more, got {shard_tokens} and {tokenizer_bytes}")


def _existing(output: Path, request: dict[str, Any]) -> Manifest | None:
    """The manifest of what this request has made before, or None where `output` is free."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not (output / MANIFEST_FILE).is_file():
        raise UserError(f"{output} exists and holds something else than prepared data: choose another output")
    manifest = Manifest.read(output)
    for name, value in request.items():
        if (before := manifest.request.get(name)) != value:
            raise UserError(
                f"{output} was prepared with {name} = {before!r}, not {value!r}: choose another output, or "
                "delete it to prepare it anew"
            )
    for split in SPLITS:
        TokenShards(output, split)
    load_tokenizer(output)
    return manifest


@contextmanager
def _whole_or_not_at_all(output: Path) -> Iterator[Path]:
    """A new folder beside `output` that takes its name when the context ends well, else is deleted."""
    partial = output.with_name(f"{output.name}.partial-{secrets.token_hex(4)}")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial)
        raise


def _progress_bar(shown: bool) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), disable=not shown)


def _bytes_on_disk(sources: Sequence[Path | HubDataset]) -> int | None:
    files = [source for source in sources if isinstance(source, Path)]
    return sum(file.stat().st_size for file in files) if len(files) == len(sources) else None


@dataclass(frozen=True)
class _Scan:
    """What the first pass found."""

    keys: array[int]
    """The 64-bit key of each document."""
    sizes: array[int]
    """The UTF-8 bytes of each document."""
    sample: list[tuple[int, str]]
    """Keys and texts of a random sample of documents, in order of key."""


def _scan(
    sources: Sequence[str | Path],
    text_field: str,
    seed: int,
    sample_bytes: int,
    bytes_on_disk: int | None,
    bar: Progress,
) -> _Scan:
    """Read everything once. The sample is the documents of smallest key that `sample_bytes` has room for."""
    task = bar.add_task("reading", total=bytes_on_disk)
    keys, sizes = array("Q"), array("Q")
    sample: list[tuple[int, str, int]] = []
    room = sample_bytes
    documents = read_documents(sources, text_field=text_field, advance=lambda num_bytes: bar.advance(task, num_bytes))
    for text in documents:
        data = text.encode()
        keys.append(document_key(data, seed))
        sizes.append(len(data))
        if sample_bytes:
            heapq.heappush(sample, (-keys[-1], text, len(data)))
            room -= len(data)
            while room < 0:
                room += heapq.heappop(sample)[2]
    return _Scan(keys, sizes, sorted((-key, text) for key, text, _ in sample))


def _learn(
    scan: _Scan, heldout: frozenset[int], vocab_size: int, tokenizer_bytes: int, bar: Progress
) -> PreTrainedTokenizerFast:
    texts = [text for key, text in scan.sample if key not in heldout]
    if not texts:
        raise UserError(
            f"tokenizer_bytes is {tokenizer_bytes}, too few for one training document to learn the tokenizer "
            "from: raise it"
        )
    task = bar.add_task("learning the tokenizer", total=None)
    tokenizer = train_tokenizer(texts, vocab_size)
    bar.remove_task(task)
    return tokenizer


@dataclass(frozen=True)
class _Piece:
    """Part of a document."""

    split: str
    text: str
    document_bytes: int | None
    """UTF-8 bytes of the whole document, in its last piece alone."""


def _pieces(documents: Iterator[str], seed: int, heldout: frozenset[int]) -> Iterator[_Piece]:
    for text in documents:
        data = text.encode()
        split = "heldout" if document_key(data, seed) in heldout else "train"
        *firsts, last = pieces(text)
        for first in firsts:
            yield _Piece(split, first, None)
        yield _Piece(split, last, len(data))


def _encode(
    stream: Iterator[_Piece],
    tokenizer: PreTrainedTokenizerFast,
    writers: dict[str, SplitWriter],
    scan: _Scan,
    bar: Progress,
) -> None:
    """Tokenize on all cores, by the tokenizer's own parallelism, and write; each document ends in a token."""
    task = bar.add_task("tokenizing", total=sum(scan.sizes))
    engine = encoder(tokenizer)
    end_of_text = np.array([tokenizer.eos_token_id])
    for batch in _batched(stream):
        encodings = engine.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
        for piece, encoding in zip(batch, encodings, strict=True):
            writer = writers[piece.split]
            writer.append(np.array(encoding.ids, np.int64))
            if piece.document_bytes is not None:
                writer.append(end_of_text)
                writer.end_document(piece.document_bytes)
                bar.advance(task, piece.document_bytes)


def _batched(stream: Iterator[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    characters = 0
    for piece in stream:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _check_unchanged(splits: dict[str, SplitRecord], scan: _Scan) -> None:
    documents = sum(split.documents for split in splits.values())
    num_bytes = sum(split.bytes for split in splits.values())
    if (documents, num_bytes) != (len(scan.sizes), sum(scan.sizes)) or not splits["heldout"].documents:
        raise UserError(
            f"the sources changed while they were read, from {len(scan.sizes)} documents of "
            f"{sum(scan.sizes)} bytes to {documents} of {num_bytes}: prepare them again when they are at rest"
        )
