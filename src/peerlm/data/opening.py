"""A data folder for token files that others made, whose tokens stay where they are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from peerlm.data.foreign import Extent, Lengths, Opened, is_parquet, open_source, read_parquet, resolve
from peerlm.data.manifest import (
    END_DTYPE,
    OPENED_FORMAT,
    SPLITS,
    TOKEN_DTYPES,
    TOKENIZER_FOLDER,
    FileRecord,
    Manifest,
    SplitRecord,
    file_sha256,
    sha256_of,
)
from peerlm.data.output import existing, whole_or_not_at_all
from peerlm.data.progress import progress_bar
from peerlm.data.sources import fingerprint
from peerlm.data.text_files import check_name
from peerlm.data.tokenizer import open_tokenizer, tokenizer_file
from peerlm.errors import UserError, shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BLOCK = 2**20
"""Tokens that are looked at together."""
_LOOKED_AT = 1000
"""Documents that show whether documents end with a mark."""

log = logging.getLogger(__name__)
"""Says on stderr, unless logging is set up otherwise, what is copied, and what marks are missing."""


def open_shards(
    sources: Sequence[str | Path],
    output: str | Path,
    *,
    tokenizer: str | Path,
    heldout: Sequence[str | Path] = (),
    holdout: float = 0.02,
    field: str = "input_ids",
    progress: bool = True,
) -> Manifest:
    """Make a folder to train on from token files that others made; their tokens are read where they are.

    All tokens are read once: each must be one of the tokenizer's, and their hash is kept. Parquet files are compressed,
    so their tokens are copied into the folder. As with `prepare`, the folder appears when it is complete, and an equal
    request returns what is there.

    Args:
        sources: in this order: Megatron-LM's NAME.bin (with NAME.idx), datatrove's NAME.ds (with NAME.ds.index),
            folders that `datasets.save_to_disk` wrote, .parquet files, or folders of such files.
        output: the folder to make.
        tokenizer: the tokenizer.json that made the tokens, or a folder with one.
        heldout: sources of the held-out split; without any, the last documents of `sources` are held out.
        holdout: share of the tokens to hold out then, within (0, 1).
        field: column of token ids in data sets and parquet files.
        progress: show progress, speed and time left on stderr.

    Raises:
        UserError: a file is missing, damaged or unknown; a token that the tokenizer does not have; a single document,
            of which nothing can be held out; `output` exists and is something else.
    """
    if not 0 < holdout < 1:
        raise UserError(f"holdout is {holdout}: it must lie between 0 and 1, both excluded, such as 0.02 for 2%")
    opened_by = open_tokenizer(tokenizer)
    found, found_heldout = (resolve([Path(each) for each in given]) for given in (sources, heldout))
    if not found:
        raise UserError("there are no sources: name token files of Megatron-LM, datatrove or Hugging Face")
    request = {
        "sources": [_fingerprint(source) for source in found],
        "heldout": [_fingerprint(source) for source in found_heldout],
        "holdout": None if heldout else holdout,
        "tokenizer": file_sha256(tokenizer_file(tokenizer)),
        "vocab_size": None,
        "field": field,
    }
    output = Path(output).resolve()
    check_name(output)
    if (manifest := existing(output, request)) is not None:
        return manifest
    vocab_size = max(opened_by.get_vocab().values()) + 1
    dtype = TOKEN_DTYPES[0] if vocab_size <= 2**16 else TOKEN_DTYPES[1]
    with whole_or_not_at_all(output) as folder, progress_bar(progress) as bar:
        copies = _Copies(folder, field, dtype, vocab_size)
        train = _joined([copies.of(source) if is_parquet(source) else open_source(source, field) for source in found])
        if found_heldout:
            rest = _joined(
                [copies.of(each) if is_parquet(each) else open_source(each, field) for each in found_heldout]
            )
        else:
            train, rest = _split(train, holdout)
        copies.say()
        opened_by.save_pretrained(folder / TOKENIZER_FOLDER)
        task = bar.add_task("checking", total=sum(_num_bytes(part) for each in (train, rest) for part in each.extents))
        checked: dict[str, SplitRecord] = {}
        for name, split in zip(SPLITS, (train, rest), strict=True):
            checked[name] = _record(folder, name, split, vocab_size, lambda done: bar.advance(task, done))
        start = _marks(train, opened_by)
        manifest = Manifest(
            format=OPENED_FORMAT,
            request=request,
            vocab_size=vocab_size,
            eos_token_id=opened_by.eos_token_id,
            dtype=dtype,
            tokenizer_sha256=file_sha256(tokenizer_file(folder / TOKENIZER_FOLDER)),
            splits=checked,
            document_start=start,
        )
        manifest.write(folder)
    return manifest


def _fingerprint(source: Path) -> dict[str, object]:
    return fingerprint(source / "state.json" if source.is_dir() else source)


class _Copies:
    """Tokens of parquet files, copied into the folder."""

    def __init__(self, folder: Path, field: str, dtype: str, vocab_size: int) -> None:
        self._folder, self._field, self._dtype, self._vocab_size = folder, field, dtype, vocab_size
        self._sources: list[Path] = []

    def of(self, source: Path) -> Opened:
        path = self._folder / f"copied-{len(self._sources):05d}.bin"
        self._sources.append(source)
        items, lengths = 0, [np.empty(0, np.int64)]
        with path.open("wb") as file:
            for values, of_rows in read_parquet(source, self._field):
                _check(values, self._vocab_size, source, items)  # before a narrower type cuts them off
                file.write(values.astype(self._dtype).tobytes())
                items += len(values)
                lengths.append(of_rows)
        return Opened([Extent(path, 0, items, self._dtype)], np.concatenate(lengths))

    def say(self) -> None:
        if self._sources:
            log.warning(
                "Parquet is compressed and cannot be read in place: the tokens of %s files are copied into the folder.",
                f"{len(self._sources):,}",
            )


def _joined(opened: list[Opened]) -> Opened:
    extents = [extent for each in opened for extent in each.extents if extent.items]
    lengths = np.concatenate([each.lengths for each in opened])
    if not extents:
        raise UserError("the sources hold no tokens: name others")
    return Opened(extents, lengths)


def _split(whole: Opened, holdout: float) -> tuple[Opened, Opened]:
    """The last documents, of at least `holdout` of the tokens, are held out."""
    ends = np.cumsum(whole.lengths)
    cuts = ends[(ends > 0) & (ends < ends[-1])]
    if not len(cuts):
        raise UserError("the sources hold 1 document, of which nothing can be held out: name others by --heldout")
    fitting = cuts[cuts <= ends[-1] * (1 - holdout)]
    train = int(np.searchsorted(ends, fitting[-1] if len(fitting) else cuts[0], side="right"))
    log.warning(
        "The last %s of %s documents are held out, %.2g%% of the tokens.",
        f"{len(ends) - train:,}",
        f"{len(ends):,}",
        100 * (1 - ends[train - 1] / ends[-1]),
    )
    left, heads, tails = int(ends[train - 1]), [], []
    for extent in whole.extents:
        head = min(left, extent.items)
        left -= head
        heads.append(replace(extent, items=head))
        size = np.dtype(extent.dtype).itemsize
        tails.append(replace(extent, offset=extent.offset + head * size, items=extent.items - head))
    parts = ([extent for extent in side if extent.items] for side in (heads, tails))
    return tuple(map(Opened, parts, (whole.lengths[:train], whole.lengths[train:])))  # type: ignore[return-value]


def _num_bytes(extent: Extent) -> int:
    return extent.items * np.dtype(extent.dtype).itemsize


def _tokens(extent: Extent) -> npt.NDArray[np.integer]:
    mapped = np.memmap(extent.path, np.uint8, mode="r", offset=0)
    tokens: npt.NDArray[np.integer] = mapped[extent.offset : extent.offset + _num_bytes(extent)].view(extent.dtype)
    return tokens


def _record(folder: Path, name: str, split: Opened, vocab_size: int, advance: Callable[[int], None]) -> SplitRecord:
    """Check every token of a split, write where its documents end, and describe it."""
    records = []
    for extent in split.extents:
        tokens = _tokens(extent)
        for start in range(0, extent.items, _BLOCK):
            block = tokens[start : start + _BLOCK]
            _check(block, vocab_size, extent.path, start)
            advance(block.nbytes)
        inside = extent.path.parent == folder
        record = FileRecord(
            file=extent.path.name if inside else str(extent.path.resolve()),
            items=extent.items,
            sha256=sha256_of(tokens.view(np.uint8)),
            offset=extent.offset,
            dtype=extent.dtype,
            file_bytes=extent.path.stat().st_size,
        )
        records.append(record)
    ends = np.cumsum(split.lengths).astype(END_DTYPE)
    path = folder / f"{name}-ends.bin"
    path.write_bytes(ends.tobytes())
    return SplitRecord(
        documents=len(ends),
        tokens=sum(extent.items for extent in split.extents),
        bytes=None,
        shards=tuple(records),
        ends=FileRecord(file=path.name, items=len(ends), sha256=file_sha256(path)),
    )


def _check(tokens: npt.NDArray[np.integer], vocab_size: int, path: Path, start: int) -> None:
    wrong = (tokens < 0) | (tokens >= vocab_size)
    if wrong.any():
        at = int(wrong.argmax())
        raise UserError(
            f"{path} has token {tokens[at]} at place {start + at:,} of a part, and the tokenizer has {vocab_size:,} "
            "tokens: name the tokenizer that made the file"
        )


def _marks(split: Opened, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """What begins documents and so windows; says so where nothing ends them. By the first thousand documents."""
    ends = np.cumsum(split.lengths)[:_LOOKED_AT]
    last, first = _at(split, ends - 1), _at(split, np.r_[0, ends[:-1]])
    if (last != tokenizer.eos_token_id).any():
        share = 100 * float((last != tokenizer.eos_token_id).mean())
        log.warning(
            "%.3g%% of the first %s documents do not end with %s, the tokenizer's end-of-text token: a model reads the "
            "next document as if it continued them.",
            share,
            f"{len(ends):,}",
            shortened(repr(tokenizer.eos_token)),
        )
    start = tokenizer.bos_token_id
    return (start,) if start is not None and start != tokenizer.eos_token_id and (first == start).all() else ()


def _at(split: Opened, places: Lengths) -> npt.NDArray[np.int64]:
    """The tokens at these places of a split, which ascend."""
    found, start = [], 0
    for extent in split.extents:
        inside = places[(places >= start) & (places < start + extent.items)] - start
        if len(inside):
            found.append(_tokens(extent)[inside].astype(np.int64))
        start += extent.items
        if len(places) and start > places[-1]:
            break
    return np.concatenate(found) if found else np.empty(0, np.int64)
