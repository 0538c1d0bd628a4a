"""LAMBADA: perplexity and accuracy of the last word of a passage (Paperno 2016, arXiv 1606.06031)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedTokenizerFast

from peerlm.data.tokenizer import encoder
from peerlm.errors import UserError
from peerlm.evaluate.encoding import check_limit
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
class LastWordScore:
    """How well a model predicts the last word of passages."""

    passages: int
    """Passages scored."""
    truncated: int
    """Passages longer than the context, of which the beginning was not read."""
    nats: float
    """Negative log-likelihood of all last words."""
    correct: int
    """Passages where every token of the last word was the most likely one."""

    @property
    def perplexity(self) -> float:
        """exp(nats per last word), whatever the number of its tokens."""
        return exp(self.nats / self.passages)

    @property
    def accuracy(self) -> float:
        """Share of last words predicted by greedy decoding, 0 to 1."""
        return self.correct / self.passages


def score_last_words(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    passages: Iterable[tuple[str, str]],
    *,
    context: int,
    batch_size: int = 8,
    limit: int | None = None,
    report: Report = silent,
) -> LastWordScore:
    """Score the continuation of each (context, continuation), read as context + " " + continuation.

    A passage begins with an end-of-text token; one of more than `context` tokens loses its beginning.
    Passages of like length are read together, `batch_size` at a time, padded on the right. `limit` stops
    after the passage that brings the tokens of all to that many. `report` is called after each pass with the
    number of passages scored, and in all.

    Raises UserError when there are no passages, a continuation has no tokens or more than `context`,
    or as `check_context` and `check_limit`.
    """
    check_context(model, context)
    check_limit(limit)
    engine = encoder(tokenizer)
    examples: list[tuple[list[int], int]] = []
    num_tokens = 0
    for number, passage in enumerate(passages, 1):
        before, word = split_tokens(engine, *passage)
        if not 0 < len(word) <= context:
            raise UserError(
                f"the continuation of passage {number} has {len(word)} tokens; it needs 1 to the context, {context}"
            )
        examples.append(([tokenizer.eos_token_id, *before, *word], len(word)))
        num_tokens += len(before) + len(word)
        if limit is not None and num_tokens >= limit:
            break
    if not examples:
        raise UserError("there are no passages to score; give at least one")
    truncated = sum(len(tokens) - 1 > context for tokens, _ in examples)
    by_length = sorted(((tokens[-context - 1 :], word) for tokens, word in examples), key=lambda item: len(item[0]))
    nats, correct = 0.0, 0
    with evaluating(model):
        for start in range(0, len(by_length), batch_size):
            batch = by_length[start : start + batch_size]
            batch_nats, batch_correct = _score(model, batch)
            nats += batch_nats
            correct += batch_correct
            report(start + len(batch), len(by_length))
    return LastWordScore(passages=len(examples), truncated=truncated, nats=nats, correct=correct)


def split_tokens(engine: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of `context` and of " " + `continuation`, together the tokens of the whole text.

    Where the tokenizer merges across the boundary, each part is tokenized on its own, so that no token of the
    continuation is given away and none of the context is scored.
    """
    before_text, word_text = context.rstrip(" "), " " + continuation.strip()
    texts = [before_text, before_text + word_text]
    before, whole = (encoding.ids for encoding in engine.encode_batch(texts, add_special_tokens=False))
    if whole[: len(before)] == before:
        return before, whole[len(before) :]
    return before, engine.encode(word_text, add_special_tokens=False).ids


def _score(model: nn.Module, batch: Sequence[tuple[list[int], int]]) -> tuple[float, int]:
    """Nats and correct predictions of the last words, of (tokens, tokens in the last word) per passage."""
    lengths = [len(tokens) - 1 for tokens, _ in batch]
    longest = max(lengths)
    device = device_of(model)
    padded = torch.tensor([tokens + [0] * (longest + 1 - len(tokens)) for tokens, _ in batch])
    position, ends = torch.arange(longest), torch.tensor(lengths)[:, None]
    starts = ends - torch.tensor([[word] for _, word in batch])
    keep = longest - int(starts.min())
    in_word = ((starts <= position) & (position < ends))[:, -keep:]
    attention_mask = (position < ends).to(device) if min(lengths) < longest else None
    logits = last_logits(model, padded[:, :-1].to(device), keep, attention_mask)
    targets = padded[:, 1:][:, -keep:].to(device)
    nats = token_nats(logits, targets).double().cpu()[in_word].sum()
    missed = (logits.argmax(-1) != targets).cpu() & in_word
    return nats.item(), len(batch) - int(missed.any(1).sum())
