"""Evaluate a run or a saved model on files: one row of figures for each."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import Progress, TaskID
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from peerlm.errors import UserError
from peerlm.evaluate.detokenize import detokenize
from peerlm.evaluate.files import PASSAGE, fields_of, read_documents, read_passages
from peerlm.evaluate.lambada import score_last_words
from peerlm.evaluate.likelihood import Report
from peerlm.evaluate.loading import default_context, load_model
from peerlm.evaluate.perplexity import check_windows, score_text
from peerlm.evaluate.progress import progress_bar
from peerlm.usage import record_usage

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
    packs: Sequence[str | Path] = (),
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Score each file with the model of a run or of a saved model.

    Args:
        path: as `load_model`.
        files: text, JSONL or parquet files, as `evaluate.files` reads them.
        context: tokens read at once; default: those of the run's training, else 2,048 or the most
            that the model reads, whichever is less.
        stride: tokens that each window scores of text; default: half the context.
        limit: tokens of each file that are read; default: all.
        detokenized: read tokenised text, such as WikiText's, as people write it (see `evaluate.detokenize`); its bytes
            and words, which bits_per_byte and word_perplexity divide by, are still those of the file. Passages stay.
        packs: folders of packs to load into the model (`peerlm.packs.api`).
        progress: whether to show a bar on stderr, when that is a terminal.

    Returns:
        By file name as given, a row ready for JSON (an infinite figure is None). Text: context, stride,
        tokens, bytes, words, perplexity, word_perplexity, bits_per_byte. Passages: context, passages,
        truncated, perplexity (of the last word), accuracy. Where the model has layers that retrieve, also
        usage (share of their experts, 0 to 1) and unevenness (nats): lists, a number for each such layer,
        over all tokens read of that file, as often as they were read.

    Raises:
        UserError: a model or file that cannot be used, no files, or an impossible context, stride or limit.
    """
    if not files:
        raise UserError("there are no files to evaluate on; name at least one")
    if detokenized and limit is not None:
        raise UserError(
            f"the limit is {limit} tokens, but the words of detokenized text are known of whole files alone"
        )
    fields_by_file = {str(file): fields_of(Path(file)) for file in files}
    model, tokenizer = load_model(path, packs)
    if context is None:
        context = default_context(path, model)
    stride = context // 2 if stride is None else stride
    check_windows(model, context, stride)
    rows = {}
    with progress_bar(shown=progress) as bar:
        for file, fields in fields_by_file.items():
            task = bar.add_task(Path(file).name, total=None)
            rows[file] = _evaluate_file(
                model,
                tokenizer,
                Path(file),
                fields,
                context=context,
                stride=stride,
                limit=limit,
                detokenized=detokenized,
                report=partial(_advance, bar, task),
            )
    return rows


def _evaluate_file(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    file: Path,
    fields: tuple[str, ...],
    *,
    context: int,
    stride: int,
    limit: int | None,
    detokenized: bool,
    report: Report,
) -> dict[str, Any]:
    """The row of one file."""
    batch_size = max(1, TOKENS_PER_PASS[model.device.type] // context)
    row: dict[str, Any] = {"context": context}
    with record_usage(model) as usage:
        if fields == PASSAGE:
            last_words = score_last_words(
                model,
                tokenizer,
                read_passages(file),
                context=context,
                batch_size=batch_size,
                limit=limit,
                report=report,
            )
            row |= {
                "passages": last_words.passages,
                "truncated": last_words.truncated,
                "perplexity": _finite(last_words.perplexity),
                "accuracy": last_words.accuracy,
            }
        else:
            documents: Iterable[str] = read_documents(file, fields)
            if detokenized:
                documents = list(documents)
                row["detokenized"] = True
            text = score_text(
                model,
                tokenizer,
                map(detokenize, documents) if detokenized else documents,
                context=context,
                stride=stride,
                batch_size=batch_size,
                limit=limit,
                report=report,
            )
            if detokenized:
                words, num_bytes = (sum(map(size, documents)) for size in (_words, _bytes))
                text = replace(text, words=words, bytes=num_bytes)
            row |= {
                "stride": stride,
                "tokens": text.tokens,
                "bytes": text.bytes,
                "words": text.words,
                "perplexity": _finite(text.perplexity),
                "word_perplexity": _finite(text.word_perplexity),
                "bits_per_byte": _finite(text.bits_per_byte),
            }
    if usage:
        row["usage"] = [layer.share for layer in usage.values()]
        row["unevenness"] = [layer.unevenness for layer in usage.values()]
    return row


def _words(text: str) -> int:
    return len(text.split())


def _bytes(text: str) -> int:
    return len(text.encode())


def _finite(figure: float) -> float | None:
    """The figure, or None where JSON has no word for it."""
    return figure if math.isfinite(figure) else None


def _advance(bar: Progress, task: TaskID, done: int, total: int) -> None:
    bar.update(task, completed=done, total=total)
