"""Evaluate a run or a saved model on files: one row of figures for each."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import Progress, TaskID
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from peerlm.data.shards import TokenShards
from peerlm.errors import UserError
from peerlm.evaluate.copying import CopyCounts, check_length, copy_probe
from peerlm.evaluate.detokenize import detokenize
from peerlm.evaluate.encoding import encode
from peerlm.evaluate.files import PASSAGE, fields_of, read_document_parts, read_passages
from peerlm.evaluate.held_out import held_out_loss
from peerlm.evaluate.lambada import score_last_words
from peerlm.evaluate.likelihood import Report
from peerlm.evaluate.loading import default_context, load_model
from peerlm.evaluate.notes import notes_on
from peerlm.evaluate.perplexity import check_windows, score_text
from peerlm.evaluate.progress import progress_bar
from peerlm.evaluate.split import held_out_split, split_documents
from peerlm.evaluate.windows import begin_windows
from peerlm.marks import AUTO, Marks, marked, marks_of
from peerlm.usage import record_usage

COPY_WINDOWS = 256
"""Windows of a text on which copying is measured at the most."""
TOKENS_PER_PASS = {"cpu": 2048, "cuda": 16384}
"""Tokens read in one forward pass, by device: few, so that on a CPU activations stay in its caches."""


def evaluate(
    path: str | Path,
    files: Sequence[str | Path],
    *,
    context: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    detokenized: bool = False,
    copying: bool = False,
    document_start: str = AUTO,
    packs: Sequence[str | Path] = (),
    device_rows: int = 0,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Score each file with the model of a run or of a saved model.

    Args:
        path: as `load_model`.
        files: text, JSONL or parquet files, as `evaluate.files` reads them; none: the documents that were held out of
            the data that the run was trained on.
        context: tokens read at once; default: those of the run's training, else 2,048 or the most
            that the model reads, the smaller of the two.
        stride: tokens that each window scores of text; default: half the context.
        limit: tokens of each file that are read; default: all.
        detokenized: read tokenised text, such as WikiText's, as people write it (see `evaluate.detokenize`); its bytes
            and words, which bits_per_byte and word_perplexity divide by, are still those of the file. Passages stay.
        copying: whether to measure what the model copies from its context, on the first `COPY_WINDOWS` windows of each
            text.
        document_start: what stands before each document: "auto", "none" or a token (see `peerlm.marks`).
        packs: folders of packs to load into the model (`peerlm.packs.api`).
        device_rows: as `load_model`.
        progress: whether to show a bar on stderr, when that is a terminal.

    Returns:
        By file name as given, a row ready for JSON (an infinite figure is None). Text: context, document_start (the
        tokens as text, None for none), start_from (who says so), stride, reading (how documents are read), tokens,
        bytes, words, perplexity, word_perplexity, bits_per_byte. Passages: context, document_start, start_from,
        passages, truncated, perplexity (of the last word), accuracy. Where the tokenizer loses text, also lost: shares
        of its bytes by reason (`data.text_loss`). Where the model has layers that retrieve, also usage (share of their
        experts, 0 to 1) and unevenness (nats): lists, a number for each such layer, over all tokens read of that file,
        as often as they were read. With `copying`, of text also copying: windows, and the figures of
        `CopyCounts.figures` and `copy_probe`. Where figures need a word of warning, also notes: a list of sentences.

    Raises:
        UserError: a model or file that cannot be used, no files for a model that is no run's, or an impossible context,
            stride or limit.
    """
    split = None if files else held_out_split(path)
    if detokenized and limit is not None:
        raise UserError(
            f"the limit is {limit} tokens, but the words of detokenized text are known of whole files alone"
        )
    fields_by_file = {str(file): fields_of(Path(file)) for file in files}
    if split is not None:
        fields_by_file = {f"held out of {split.folder}": ()}
    model, tokenizer = load_model(path, packs, device_rows=device_rows)
    if context is None:
        context = default_context(path, model)
    stride = context // 2 if stride is None else stride
    marks = marks_of(model, tokenizer, document_start)
    check_windows(model, context, stride, marks)
    rows = {}
    with progress_bar(shown=progress) as bar:
        for file, fields in fields_by_file.items():
            task = bar.add_task(Path(file).name, total=None)
            rows[file] = _evaluate_file(
                model,
                tokenizer,
                Path(file) if split is None else split,
                fields,
                marks,
                context=context,
                stride=stride,
                limit=limit,
                detokenized=detokenized,
                copying=copying,
                name=Path(file).name,
                report=partial(_advance, bar, task),
            )
    return rows


def _evaluate_file(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    file: Path | TokenShards,
    fields: tuple[str, ...],
    marks: Marks,
    *,
    context: int,
    stride: int,
    limit: int | None,
    detokenized: bool,
    copying: bool,
    name: str,
    report: Report,
) -> dict[str, Any]:
    """The row of one file, or of a split."""
    batch_size = max(1, TOKENS_PER_PASS[model.device.type] // context)
    row: dict[str, Any] = {
        "context": context,
        "document_start": marked(marks.start, tokenizer),
        "start_from": marks.source,
    }
    with record_usage(model) as usage:
        if isinstance(file, Path) and fields == PASSAGE:
            last_words = score_last_words(
                model,
                tokenizer,
                read_passages(file),
                context=context,
                batch_size=batch_size,
                limit=limit,
                marks=marks,
                name=name,
                report=report,
            )
            lost = last_words.loss.shares
            row |= {
                "passages": last_words.passages,
                "truncated": last_words.truncated,
                "perplexity": _finite(last_words.perplexity),
                "accuracy": last_words.accuracy,
            }
        else:
            documents = _documents(file, fields)
            whole: list[str] = []
            if detokenized:
                whole = ["".join(document) for document in documents]
                row["detokenized"] = True
            text = score_text(
                model,
                tokenizer,
                map(detokenize, whole) if detokenized else documents,
                context=context,
                stride=stride,
                batch_size=batch_size,
                limit=limit,
                marks=marks,
                name=name,
                report=report,
            )
            lost = text.loss.shares
            if detokenized:
                words, num_bytes = (sum(map(size, whole)) for size in (_words, _bytes))
                text = replace(text, words=words, bytes=num_bytes - text.loss.dropped)
            row |= {
                "stride": stride,
                "reading": marks.reading,
                "tokens": text.tokens,
                "bytes": text.bytes,
                "words": text.words,
                "perplexity": _finite(text.perplexity),
                "word_perplexity": _finite(text.word_perplexity),
                "bits_per_byte": _finite(text.bits_per_byte),
            }
    if copying and fields != PASSAGE:
        read = _documents(file, fields)
        if detokenized:
            read = (detokenize("".join(document)) for document in read)
        row["copying"] = _copying(model, tokenizer, read, marks, context, batch_size, limit, name)
    if lost:
        row["lost"] = lost
    if usage:
        row["usage"] = [layer.share for layer in usage.values()]
        row["unevenness"] = [layer.unevenness for layer in usage.values()]
    if notes := notes_on(model, windows_per_pass=batch_size):
        row["notes"] = notes
    return row


def _documents(file: Path | TokenShards, fields: tuple[str, ...]) -> Iterable[str | Iterable[str]]:
    return split_documents(file) if isinstance(file, TokenShards) else read_document_parts(file, fields)


def _copying(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    documents: Iterable[str | Iterable[str]],
    marks: Marks,
    context: int,
    batch_size: int,
    limit: int | None,
    name: str,
) -> dict[str, Any]:
    """What the model copies in the first windows of documents."""
    read = COPY_WINDOWS * context if limit is None else min(limit, COPY_WINDOWS * context)
    tokens = encode(tokenizer, documents, marks, limit=read, name=name).tokens
    tokens = begin_windows(tokens, context, marks.window_start)
    windows = tokens[: len(tokens) // context * context].view(-1, context)
    if not len(windows):
        raise UserError(
            f"copying is measured on whole windows of {context} tokens, and {len(tokens)} of {name} are read: "
            "lower the context, or leave copying out"
        )
    check_length(context, marks.window_start)
    counts = CopyCounts(windows, limit=None, device=model.device)
    held_out_loss(model, windows, batch_size=batch_size, watch=counts.add)
    return {"windows": len(windows), **counts.figures(), **copy_probe(model, windows, begin=marks.window_start)}


def _words(text: str) -> int:
    return len(text.split())


def _bytes(text: str) -> int:
    return len(text.encode())


def _finite(figure: float) -> float | None:
    """The figure, or None where JSON has no word for it."""
    return figure if math.isfinite(figure) else None


def _advance(bar: Progress, task: TaskID, done: int, total: int) -> None:
    bar.update(task, completed=done, total=total)
