"""Perplexity and bits per byte of text by a sliding window.

A text is read as in training: its documents in sequence, an end-of-text token before each. Every token of the
documents is scored exactly once; the end-of-text tokens are read but not scored, so that totals belong to the
text alone and bits per byte compare models with different tokenizers.

Windows of `context` tokens advance by `stride`; each scores its last `stride` tokens (the first window all of
its own), so that every token is predicted from at least context - stride tokens before it, where the text has
them. The last window is moved back to be full.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from peerlm.errors import UserError
from peerlm.evaluate.encoding import encode
from peerlm.evaluate.likelihood import (
    Report,
    check_context,
    device_of,
    exp,
    last_logits,
    silent,
    token_nats,
)
from peerlm.layers.modes import evaluating


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
    documents: str | Iterable[str],
    *,
    context: int,
    stride: int | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    report: Report = silent,
) -> TextScore:
    """Score a text, or documents in sequence; arguments as `score_tokens`.

    `stride` is half the context by default. `limit` stops after that many tokens, cutting the last document;
    bytes and words are then those of the part that was scored.

    Raises:
        UserError: nothing to score, or as `score_tokens`.
    """
    stride = context // 2 if stride is None else stride
    check_windows(model, context, stride)
    text = encode(tokenizer, [documents] if isinstance(documents, str) else documents, limit=limit)
    nats = score_tokens(model, text.tokens, context=context, stride=stride, batch_size=batch_size, report=report)
    scored = text.scored[1:]
    return TextScore(tokens=int(scored.sum()), bytes=text.bytes, words=text.words, nats=nats[scored].sum().item())


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


def check_windows(model: nn.Module, context: int, stride: int) -> None:
    """UserError unless 1 <= stride <= context, or as `check_context`."""
    check_context(model, context)
    if not 1 <= stride <= context:
        raise UserError(f"the stride is {stride}; it must be 1 to the context, {context}")
