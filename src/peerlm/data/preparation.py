"""Text to token shards: two passes over the sources, the result all or nothing."""

from __future__ import annotations

import heapq
import json
import logging
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, tee
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from rich.progress import Progress

from peerlm.data.encoder import warn_of_loss
from peerlm.data.manifest import (
    FORMAT,
    SPLITS,
    TOKEN_DTYPES,
    TOKENIZER_FOLDER,
    Manifest,
    SplitRecord,
    file_sha256,
)
from peerlm.data.output import PROGRESS_FILE, RESUME, existing, resumable
from peerlm.data.progress import progress_bar
from peerlm.data.request import request_of
from peerlm.data.sources import HubDataset, Survey, read_documents, survey
from peerlm.data.split import TAIL_SHARE, choose_heldout, copy_key, cut_tail, document_key
from peerlm.data.text_files import check_name, tally
from peerlm.data.text_loss import TextLoss
from peerlm.data.tokenizer import (
    MIN_VOCAB_SIZE,
    keep_start,
    open_tokenizer,
    pieces,
    tokenizer_file,
    train_tokenizer,
)
from peerlm.data.workers import Encoded, LostWorkerError, Texts, batch_encoder
from peerlm.data.writer import SplitWriter
from peerlm.errors import UserError
from peerlm.files import write_json
from peerlm.marks import AUTO, NONE, Marks, document_marks, marks_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BATCH_CHARACTERS = 2**21
_SECONDS_UNTIL_SAVED = 10.0

Documents = Callable[[], Iterator[str]]
"""Begins to read the documents, each time from the start."""

log = logging.getLogger(__name__)
"""Says on stderr, unless logging is set up otherwise, what was skipped or is not as asked for."""


def prepare(
    sources: Sequence[str | Path],
    output: str | Path,
    *,
    tokenizer: str | Path | None = None,
    vocab_size: int = 4096,
    holdout: float | None = 0.02,
    heldout_bytes: int = 0,
    seed: int = 0,
    text_field: str = "text",
    shard_tokens: int = 2**26,
    tokenizer_bytes: int = 2**26,
    document_start: str = AUTO,
    workers: int = 1,
    progress: bool = True,
) -> Manifest:
    """Turn text into a folder of token shards with a tokenizer, a held-out split and a manifest.

    The first pass over the sources finds the size and keyed hash of each document. It keeps a random sample of the
    text, from which the tokenizer is learned; the second tokenizes. Memory holds the sample, one batch, one document,
    and about 100 bytes per document. Copies of a document, which differ in white space and the like (see
    `split.copy_key`), are kept, and lie in one split. Of a single document the end is held out (`split.cut_tail`).

    The folder appears under its name when it is complete. When it is there already, made from the same sources
    with the same arguments, it is left as it is and its manifest returned. A process killed halfway leaves a
    folder OUTPUT.partial-..., from which the same request resumes; it may be deleted.

    Args:
        sources: see `read_documents`.
        output: the folder to make; its parents are made too.
        tokenizer: a tokenizer.json or a folder with one; None learns one from the training documents.
        vocab_size: tokens of the vocabulary to learn, at least 257; of no effect with `tokenizer`.
        holdout: share of the text to hold out, within (0, 1); see `split.choose_heldout`. None holds nothing out.
        heldout_bytes: hold out at least this much of a text, however short, but not more than a fifth of it.
        seed: key of the choice of held-out documents, 0 or more.
        text_field: the JSON field or parquet column that holds the text.
        shard_tokens: most tokens in one shard.
        tokenizer_bytes: UTF-8 bytes of text to learn the tokenizer from, a random sample of documents; of no
            effect with `tokenizer`.
        document_start: what stands before each document, "auto", "none" or a token (see `peerlm.marks`), and begins
            every window; nothing where it is the token that ends documents. Where it differs from what the tokenizer
            and its model say, the tokenizer saved with the shards gets it as its template. So later readers follow it.
        workers: processes that tokenize, at least 1. The folder does not depend on it. With 1 the tokenizer's own
            threads use all cores, but all the rest is done by one.
        progress: show progress, speed and time left on stderr.

    Raises:
        UserError: a source or tokenizer cannot be read, or holds no text (with file and line); a single document is too
            short to hold out its end; an argument is out of range; `output` exists and is something else, or another
            process makes it; a process that tokenizes was killed.

    Warns:
        PeerlmWarning: part of the text does not come back from its tokens; the manifest has the shares.
    """
    if workers < 1:
        raise UserError(f"workers is {workers}: it must be at least 1")
    _check_ranges(vocab_size if tokenizer is None else None, holdout, seed, shard_tokens, tokenizer_bytes)
    given = None if tokenizer is None else open_tokenizer(tokenizer)
    if given is None and document_start != AUTO:
        raise UserError(
            f"document_start is {document_start!r}, but a tokenizer that is learned has one mark: leave it out"
        )
    marks = None if given is None else _marks(given, Path(str(tokenizer)), document_start)
    surveyed = survey(sources)
    request = request_of(
        surveyed.found,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        holdout=holdout,
        heldout_bytes=heldout_bytes,
        seed=seed,
        text_field=text_field,
        shard_tokens=shard_tokens,
        tokenizer_bytes=tokenizer_bytes,
        document_start=list(marks.window_start) or None if marks else None,
    )
    output = Path(output).resolve()
    check_name(output)
    if (found := existing(output, request)) is not None:
        return found
    _say_passed_over(surveyed)

    with resumable(output, request) as folder, progress_bar(progress) as bar:
        documents: Documents = partial(read_documents, sources, text_field=text_field)
        layout = _Layout.read(folder / RESUME)
        if layout is not None:
            used = given or open_tokenizer(folder / TOKENIZER_FOLDER)
        else:
            sample_bytes = 0 if given else tokenizer_bytes
            scan = _scan(sources, text_field, seed, sample_bytes, _bytes_on_disk(surveyed.found), bar)
            distinct = len(np.unique(np.asarray(scan.keys)))
            copies = len(scan.keys) - distinct
            heldout: frozenset[int] = frozenset()
            share = 0.0 if holdout is None else max(holdout, min(heldout_bytes / sum(scan.sizes), TAIL_SHARE))
            cut = share if holdout is not None and distinct == 1 else None
            if cut is not None:
                scan = _scan_documents(_halves(documents, cut), seed, sample_bytes)
                heldout = frozenset(scan.keys[1:])
                _say_cut(scan, copies)
                copies = 0
            elif holdout is not None:
                heldout = choose_heldout(scan.keys, scan.sizes, share, order=scan.order)
                _say_split(scan, heldout, holdout, copies)
            used = given or _learn(scan, heldout, vocab_size, tokenizer_bytes, bar)
            layout = _Layout(np.array([key in heldout for key in scan.keys]), sum(scan.sizes), copies, cut)
            layout.write(folder / RESUME)
            used.save_pretrained(folder / TOKENIZER_FOLDER)
        marks = marks or document_marks(used)
        largest_id = max(used.get_vocab().values())
        dtype = TOKEN_DTYPES[0] if largest_id < 2**16 else TOKEN_DTYPES[1]
        reading = documents() if layout.cut is None else _halves(documents, layout.cut)
        progress_file = folder / RESUME / PROGRESS_FILE
        done = _Done.read(progress_file)
        with ExitStack() as open_files:
            writers = {
                split: open_files.enter_context(
                    SplitWriter(folder, split, dtype, shard_tokens, done.positions.get(split))
                )
                for split in SPLITS
            }
            encode = open_files.enter_context(batch_encoder(used, workers))
            _encode(
                _pieces(reading, layout.heldout), encode, marks, writers, layout.total_bytes, done, progress_file, bar
            )
            splits = {split: writer.finish() for split, writer in writers.items()}
        lost = done.loss
        _check_unchanged(splits, layout, lost)
        manifest = Manifest(
            format=FORMAT,
            request=request,
            vocab_size=largest_id + 1,
            eos_token_id=used.eos_token_id,
            dtype=dtype,
            tokenizer_sha256=file_sha256(tokenizer_file(folder / TOKENIZER_FOLDER)),
            splits=splits,
            document_start=marks.window_start,
            document_end=marks.end,
            lost=lost.shares,
            files={"read": dict(surveyed.read), "passed_over": dict(surveyed.passed_over)},
            copies=layout.copies,
        )
        manifest.write(folder)
    warn_of_loss(lost, "the text")
    return manifest


def _check_ranges(
    vocab_size: int | None, holdout: float | None, seed: int, shard_tokens: int, tokenizer_bytes: int
) -> None:
    if vocab_size is not None and vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"vocab_size is {vocab_size}: it must be at least {MIN_VOCAB_SIZE}, for the 256 bytes and the end of text"
        )
    if holdout is not None and not 0 < holdout < 1:
        raise UserError(f"holdout is {holdout}: it must lie between 0 and 1, both excluded, such as 0.02 for 2%")
    if not 0 <= seed < 2**64:
        raise UserError(f"seed is {seed}: it must be 0 or more and below 2**64")
    if shard_tokens < 1 or tokenizer_bytes < 1:
        raise UserError(f"shard_tokens and tokenizer_bytes must be 1 or more, got {shard_tokens} and {tokenizer_bytes}")


def _marks(tokenizer: PreTrainedTokenizerFast, source: Path, document_start: str) -> Marks:
    """What begins and ends documents; a start that is asked for, and not what `source` says, becomes the template."""
    usual, marks = (marks_in(source, tokenizer, each) for each in (AUTO, document_start))
    if document_start == NONE:
        marks = replace(marks, start=marks.end)
    keep_start(tokenizer, marks, usual)
    return marks


def _say_passed_over(surveyed: Survey) -> None:
    if number := sum(surveyed.passed_over.values()):
        log.warning(
            "Of the files, %s are read (%s) and %s are passed over (%s).",
            f"{len(surveyed.found):,}",
            tally(surveyed.read),
            f"{number:,}",
            tally(surveyed.passed_over),
        )


def _say_cut(scan: _Scan, copies: int) -> None:
    left_out = f" Its other copies, {copies:,} of them, are left out." if copies else ""
    log.warning(
        "The text is one document, so its end is held out: %s of %s bytes, %.1f%%.%s To hold out whole documents, put "
        "lines <|endoftext|> between them.",
        f"{scan.sizes[1]:,}",
        f"{sum(scan.sizes):,}",
        100 * scan.sizes[1] / sum(scan.sizes),
        left_out,
    )


def _say_split(scan: _Scan, heldout: frozenset[int], holdout: float, copies: int) -> None:
    if copies:
        log.warning(
            "%s of the %s documents are copies of others, white space and line ends aside; a document and its copies "
            "lie in one split.",
            f"{copies:,}",
            f"{len(scan.keys):,}",
        )
    share = sum(size for key, size in zip(scan.keys, scan.sizes, strict=True) if key in heldout) / sum(scan.sizes)
    if not holdout / 2 <= share <= 2 * holdout:
        log.warning(
            "%.2g%% of the text is held out where %.2g%% was asked for: documents are held out whole, and more of a "
            "short text.",
            100 * share,
            100 * holdout,
        )


def _bytes_on_disk(sources: Sequence[Path | HubDataset]) -> int | None:
    files = [source for source in sources if isinstance(source, Path)]
    return sum(file.stat().st_size for file in files) if len(files) == len(sources) else None


@dataclass(frozen=True)
class _Scan:
    """What the first pass found."""

    keys: array[int]
    """The 64-bit `copy_key` of each document."""
    order: array[int]
    """The 64-bit `document_key` of each document."""
    sizes: array[int]
    """The UTF-8 bytes of each document."""
    sample: list[tuple[int, str]]
    """Texts of a random sample of documents or their pieces, each after the copy key of its document."""


def _scan(
    sources: Sequence[str | Path],
    text_field: str,
    seed: int,
    sample_bytes: int,
    bytes_on_disk: int | None,
    bar: Progress,
) -> _Scan:
    """Read everything once."""
    task = bar.add_task("reading", total=bytes_on_disk)
    documents = read_documents(sources, text_field=text_field, advance=lambda num_bytes: bar.advance(task, num_bytes))
    return _scan_documents(documents, seed, sample_bytes)


def _scan_documents(documents: Iterable[str], seed: int, sample_bytes: int) -> _Scan:
    """The sample is the documents, or pieces of long ones, first in order that `sample_bytes` has room for."""
    keys, order, sizes = array("Q"), array("Q"), array("Q")
    sample: list[tuple[int, int, str, int]] = []
    room = sample_bytes
    for text in documents:
        data = text.encode()
        keys.append(copy_key(text, seed))
        order.append(document_key(data, seed))
        sizes.append(len(data))
        if not sample_bytes:
            continue
        for part in [text] if len(data) <= sample_bytes // 8 else pieces(text):
            data = part.encode()
            heapq.heappush(sample, (-document_key(data, seed), keys[-1], part, len(data)))
            room -= len(data)
            while room < 0:
                room += heapq.heappop(sample)[3]
    return _Scan(keys, order, sizes, [(key, text) for _, key, text, _ in sorted(sample, reverse=True)])


def _halves(documents: Documents, holdout: float) -> Iterator[str]:
    """The first document as two, of which the second is held out."""
    reading = documents()
    yield from cut_tail(next(reading), holdout)


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
class _Layout:
    """What the first pass decided."""

    heldout: npt.NDArray[np.bool_]
    """Whether each document is held out."""
    total_bytes: int
    """UTF-8 bytes of all documents."""
    copies: int
    """As `Manifest.copies`."""
    cut: float | None
    """Share of the only document that is held out, its end; None where there are several."""

    def write(self, folder: Path) -> None:
        np.save(folder / "heldout.npy", self.heldout)
        write_json(folder / "layout.json", {"total_bytes": self.total_bytes, "copies": self.copies, "cut": self.cut})

    @classmethod
    def read(cls, folder: Path) -> _Layout | None:
        """None where nothing was tokenized before."""
        if not (folder / PROGRESS_FILE).is_file():
            return None
        return cls(np.load(folder / "heldout.npy"), **json.loads((folder / "layout.json").read_text("utf-8")))


@dataclass
class _Done:
    """How far the second pass is."""

    batches: int = 0
    bytes: int = 0
    """UTF-8 bytes of the documents that are written whole."""
    dropped: int = 0
    """Bytes that were dropped of the document that is not whole yet."""
    positions: dict[str, dict[str, int]] = field(default_factory=dict)
    """Of each split's writer."""
    loss: TextLoss = field(default_factory=TextLoss)

    def write(self, path: Path) -> None:
        write_json(path, {**vars(self), "loss": vars(self.loss)})

    @classmethod
    def read(cls, path: Path) -> _Done:
        """From a progress file; nothing done without one."""
        if not path.is_file():
            return cls()
        values = json.loads(path.read_text("utf-8"))
        examples = {kind: Counter(found) for kind, found in values["loss"].pop("examples").items()}
        done = cls(**{**values, "loss": TextLoss(**values["loss"], examples=examples)})
        log.warning("Resuming: %s bytes of the text are tokenized already.", f"{done.bytes:,}")
        return done


@dataclass(frozen=True)
class _Piece:
    """Part of a document."""

    split: str
    text: str
    first: bool
    """Whether the document begins with it."""
    document_bytes: int | None
    """UTF-8 bytes of the whole document, in its last piece alone."""


def _pieces(documents: Iterator[str], heldout: npt.NDArray[np.bool_]) -> Iterator[_Piece]:
    for document, text in enumerate(documents):
        split = "heldout" if document < len(heldout) and heldout[document] else "train"
        *others, last = pieces(text)
        for number, other in enumerate(others):
            yield _Piece(split, other, number == 0, None)
        yield _Piece(split, last, not others, len(text.encode()))


def _encode(
    stream: Iterator[_Piece],
    encode: Callable[[Iterable[Texts]], Iterator[Encoded]],
    marks: Marks,
    writers: dict[str, SplitWriter],
    total_bytes: int,
    done: _Done,
    progress_file: Path,
    bar: Progress,
) -> None:
    """Tokenize and write, with marks, what is not done yet; now and then say in `progress_file` what is."""
    task = bar.add_task("tokenizing", total=total_bytes, completed=done.bytes)
    start, end = (np.array(mark, np.int64) for mark in (marks.window_start, marks.end))
    batches, waiting = tee(islice(_batched(stream), done.batches, None))
    encoded = encode(([piece.text for piece in batch], [not piece.first for piece in batch]) for batch in batches)

    def save() -> None:
        done.positions = {split: writer.save() for split, writer in writers.items()}
        done.write(progress_file)

    saved = time.monotonic()
    try:
        for batch, found in zip(waiting, encoded, strict=True):
            for piece, tokens, dropped in zip(batch, found.ids, found.dropped, strict=True):
                writer = writers[piece.split]
                if piece.first:
                    writer.append(start)
                writer.append(tokens)
                done.dropped += dropped
                if piece.document_bytes is not None:
                    writer.append(end)
                    writer.end_document(piece.document_bytes - done.dropped)
                    done.dropped = 0
                    done.bytes += piece.document_bytes
                    bar.advance(task, piece.document_bytes)
            done.loss.merge(found.loss)
            done.batches += 1
            if time.monotonic() - saved >= _SECONDS_UNTIL_SAVED:
                save()
                saved = time.monotonic()
    except LostWorkerError:  # before the next batch was begun
        save()
        raise


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


def _check_unchanged(splits: dict[str, SplitRecord], layout: _Layout, lost: TextLoss) -> None:
    documents = sum(split.documents for split in splits.values())
    num_bytes = sum(split.bytes or 0 for split in splits.values()) + lost.dropped
    if (documents, num_bytes) != (len(layout.heldout), layout.total_bytes):
        raise UserError(
            f"the sources changed while they were read, from {len(layout.heldout)} documents of "
            f"{layout.total_bytes} bytes to {documents} of {num_bytes}: prepare them again when they no longer change"
        )
