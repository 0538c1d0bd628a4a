"""LAMBADA: perplexity and accuracy of the last word of a passage (Paperno 2016, arXiv 1606.06031)."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedTokenizerFast

from peerlm.data.encoder import TextEncoder
from peerlm.data.text_loss import TextLoss
from peerlm.errors import UserError
from peerlm.evaluate.encoding import check_limit
from peerlm.evaluate.likelihood import Report, check_context, exp, score_endings, silent
from peerlm.layers.modes import evaluating
from peerlm.marks import Marks, marks_of


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
    loss: TextLoss = field(default_factory=TextLoss)
    """What the tokenizer lost of the passages."""

    @property
    def perplexity(self) -> float:
        """exp(nats per last word), however many tokens it has."""
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
    marks: Marks | None = None,
    name: str = "the passages",
    report: Report = silent,
) -> LastWordScore:
    """Score the continuation of each (context, continuation), read as context + " " + continuation.

    A passage begins as a document does, by `marks` (default: as tokenizer and model say); one of more than `context`
    tokens loses its beginning, but keeps a mark that begins every window. A warning that part of the text does not
    come back from its tokens calls it `name`.
    Passages of like length are read together, `batch_size` at a time, padded on the right. `limit` stops
    after the passage that brings the tokens of all to that many. `report` is called after each pass with the
    number of passages scored, and in all.

    Raises UserError when there are no passages, a continuation has no tokens or more than `context`,
    or as `check_context` and `check_limit`.
    """
    check_context(model, context)
    check_limit(limit)
    marks = marks or marks_of(model, tokenizer)
    encoder = TextEncoder(tokenizer)
    examples: list[tuple[list[int], int]] = []
    num_tokens = 0
    most = context + 1 - max(1, len(marks.window_start))
    for number, passage in enumerate(passages, 1):
        before, word = split_tokens(encoder.first, *passage, rest=encoder.rest)
        if not 0 < len(word) <= most:
            raise UserError(f"the continuation of passage {number} has {len(word)} tokens; it needs 1 to {most}")
        if not (before or marks.start):
            raise UserError(f"nothing stands before the continuation of passage {number}; give it a context")
        encoder.account([joined(*passage)], [[*before, *word]], [False])
        examples.append(([*marks.start, *before, *word], len(word)))
        num_tokens += len(before) + len(word)
        if limit is not None and num_tokens >= limit:
            break
    if not examples:
        raise UserError("there are no passages to score; give at least one")
    encoder.warn(name)
    truncated = sum(len(tokens) - 1 > context for tokens, _ in examples)
    begin = list(marks.window_start)
    by_length = sorted(
        (
            (tokens if len(tokens) - 1 <= context else begin + tokens[len(begin) - context - 1 :], word)
            for tokens, word in examples
        ),
        key=lambda item: len(item[0]),
    )
    nats, correct = 0.0, 0
    with evaluating(model):
        for start in range(0, len(by_length), batch_size):
            batch = by_length[start : start + batch_size]
            batch_nats, batch_correct = score_endings(model, batch)
            nats += batch_nats.sum().item()
            correct += int(batch_correct.sum())
            report(start + len(batch), len(by_length))
    return LastWordScore(passages=len(examples), truncated=truncated, nats=nats, correct=correct, loss=encoder.loss)


def joined(context: str, continuation: str) -> str:
    """The text of a passage."""
    return f"{context.rstrip(' ')} {continuation.strip()}"


def split_tokens(
    engine: Tokenizer, context: str, continuation: str, *, rest: Tokenizer | None = None
) -> tuple[list[int], list[int]]:
    """Tokens of `context` and of " " + `continuation`, together the tokens of the whole text.

    Where the tokenizer merges across the boundary, each part is tokenized on its own. So no token of the continuation
    is given away, and none of the context is scored; the continuation by `rest`, the engine for text within a document,
    where there is one.
    """
    before_text, word_text = context.rstrip(" "), " " + continuation.strip()
    texts = [before_text, before_text + word_text]
    before, whole = (encoding.ids for encoding in engine.encode_batch(texts, add_special_tokens=False))
    if whole[: len(before)] == before:
        return before, whole[len(before) :]
    return before, (rest or engine).encode(word_text, add_special_tokens=False).ids
