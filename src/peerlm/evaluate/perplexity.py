"""Perplexity and bits per byte of text by a sliding window.

A text is read as in training. Where one end-of-text token parts documents, they are read in sequence, with that token
before each. Where documents have a beginning of their own (`peerlm.marks`), each is read alone, and every window begins
with that mark. Every token of the documents is scored exactly once; marks are read but not scored, so that totals
belong to the text alone and bits per byte compare models with different tokenizers.

Windows of `context` tokens advance by `stride`; each scores its last `stride` tokens, the first window all of its own.
So every token is predicted from at least context - stride tokens before it, where the text has them. The last window is
moved back to be full.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from peerlm.data.text_loss import TextLoss
from peerlm.errors import UserError
from peerlm.evaluate.encoding import encode
from peerlm.evaluate.likelihood import (
    Report,
    check_context,
    device_of,
    exp,
    last_logits,
    score_endings,
    silent,
    token_nats,
)
from peerlm.layers.modes import evaluating
from peerlm.marks import Marks, marks_of


@dataclass(frozen=True, kw_only=True)
class TextScore:
    """What a model makes of a text."""

    tokens: int
    """Tokens scored."""
    bytes: int
    """UTF-8 bytes of the scored text."""
    words: int
    """Whitespace-separated words of the scored text."""
    nats: float
    """Negative log-likelihood of all scored tokens."""
    loss: TextLoss = field(default_factory=TextLoss)
    """What the tokenizer lost of the text."""

    @property
    def perplexity(self) -> float:
        """exp(nats per token); depends on the tokenizer."""
        return exp(self.nats / self.tokens)

    @property
    def word_perplexity(self) -> float:
        """exp(nats per whitespace word); infinite where that is more than a float holds."""
        return exp(self.nats / self.words)

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte."""
        return self.nats / math.log(2) / self.bytes


def score_text(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    documents: str | Iterable[str | Iterable[str]],
    *,
    context: int,
    stride: int | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    marks: Marks | None = None,
    name: str = "the text",
    report: Report = silent,
) -> TextScore:
    """Score a text, or documents; arguments as `score_tokens`.

    `stride` is half the context by default. `limit` stops after that many tokens, cutting the last document;
    bytes and words are then those of the part that was scored. `marks` are what begins and ends a document, by default
    as tokenizer and model say. A warning that part of the text does not come back from its tokens calls it `name`.

    Raises:
        UserError: nothing to score, or as `check_windows`.
    """
    stride = context // 2 if stride is None else stride
    marks = marks or marks_of(model, tokenizer)
    check_windows(model, context, stride, marks)
    text = encode(tokenizer, [documents] if isinstance(documents, str) else documents, marks, limit=limit, name=name)
    if marks.streamed:
        stream = score_tokens(model, text.tokens, context=context, stride=stride, batch_size=batch_size, report=report)
        scored = text.scored[1:]
        tokens, nats = int(scored.sum()), stream[scored].sum().item()
    else:
        alone = score_documents(
            model, text.documents, marks, context=context, stride=stride, batch_size=batch_size, report=report
        )
        unscored = 0 if marks.start else len(text.documents)
        tokens, nats = sum(map(len, text.documents)) - unscored, math.fsum(alone)
    return TextScore(tokens=tokens, bytes=text.bytes, words=text.words, nats=nats, loss=text.loss)


def score_tokens(
    model: nn.Module,
    tokens: Tensor,
    *,
    context: int,
    stride: int,
    batch_size: int = 8,
    report: Report = silent,
) -> Tensor:
    """Negative log-likelihood in nats of each token given those before it.

    Args:
        model: causal language model, `model(input_ids=...).logits`.
        tokens: (length,) integers; the first one is only read, as the beginning.
        context: tokens read per window.
        stride: tokens scored per window, 1 to `context`; stride 1 gives every token its longest context.
        batch_size: windows per forward pass.
        report: called after each pass with the number of tokens scored so far, and in all.

    Returns:
        (length - 1,) float64 on the CPU: the nats of tokens[1:].

    Raises:
        UserError: as `check_windows`.
    """
    check_windows(model, context, stride)
    device = device_of(model)
    inputs, targets = tokens[:-1].long(), tokens[1:].long()
    length = len(targets)
    nats = torch.empty(length, dtype=torch.float64)

    def score(starts: Tensor, ends: Tensor, width: int, keep: int) -> None:
        """Score targets starts up to ends, each (batch,), within the last `keep` of `width` inputs."""
        read = ends[:, None] + torch.arange(-width, 0)
        kept = read[:, -keep:]
        logits = last_logits(model, inputs[read].to(device), keep)
        fresh = kept >= starts[:, None]
        nats[kept[fresh]] = token_nats(logits, targets[kept].to(device)).double().cpu()[fresh]
        report(int(ends[-1]), length)

    with evaluating(model):
        first = min(context, length)
        if first:
            score(torch.tensor([0]), torch.tensor([first]), first, first)
        for start in range(first, length, stride * batch_size):
            starts = torch.arange(start, min(start + stride * batch_size, length), stride)
            score(starts, (starts + stride).clamp_max(length), context, stride)
    return nats


def score_documents(
    model: nn.Module,
    documents: Sequence[Tensor],
    marks: Marks,
    *,
    context: int,
    stride: int,
    batch_size: int = 8,
    report: Report = silent,
) -> list[float]:
    """Score documents, each read alone after the mark that begins it; short ones share a forward pass.

    Args:
        model: causal language model, `model(input_ids=...).logits`.
        documents: token ids of each, (length,).
        marks: what begins a document, and a window within it.
        context, stride: as of `score_tokens`; with `marks.window_start` a stride of at most the context without it.
        batch_size: windows of `context` tokens in a forward pass, or as many tokens in shorter ones.
        report: called after each pass with the number of tokens scored so far, and in all.

    Returns:
        The negative log-likelihood of each document in nats. Where nothing begins a document, its first token is only
        read.

    Raises:
        UserError: as `check_windows`.
    """
    check_windows(model, context, stride, marks)
    windows = [
        (number, *window)
        for number, document in enumerate(documents)
        for window in _windows(document.tolist(), marks, context, stride)
    ]
    windows.sort(key=lambda window: len(window[1]))
    total, done = sum(scored for *_, scored in windows), 0
    nats = [0.0] * len(documents)
    with evaluating(model):
        start = 0
        while start < len(windows):
            stop = start + 1
            while stop < len(windows) and (stop + 1 - start) * (len(windows[stop][1]) - 1) <= batch_size * context:
                stop += 1
            batch = windows[start:stop]
            for (number, _, scored), value in zip(
                batch, score_endings(model, [window[1:] for window in batch])[0].tolist(), strict=True
            ):
                nats[number] += value
                done += scored
            start = stop
            report(done, total)
    return nats


def _windows(document: list[int], marks: Marks, context: int, stride: int) -> Iterator[tuple[list[int], int]]:
    """The windows of a document: the tokens that are read and the last one's target, and how many are scored."""
    tokens = [*marks.start, *document]
    first, begin = tokens[: context + 1], list(marks.window_start)
    scored = len(first) - max(1, len(marks.start))
    if scored > 0:
        yield first, scored
    for start in range(len(first), len(tokens), stride):
        end = min(start + stride, len(tokens))
        yield begin + tokens[end - (context + 1 - len(begin)) : end], end - start


def check_windows(model: nn.Module, context: int, stride: int, marks: Marks | None = None) -> None:
    """UserError unless 1 <= stride <= context, without the mark that begins a window, or as `check_context`."""
    check_context(model, context)
    begin = len(marks.window_start) if marks else 0
    if begin >= context:
        raise UserError(f"the context is {context}, but {begin} tokens begin each window; take more than that")
    if not 1 <= stride <= context - begin:
        less = f" less the {begin} that begin each window" if begin else ""
        raise UserError(f"the stride is {stride}; it must be 1 to the context, {context}{less}")
