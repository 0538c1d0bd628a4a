"""Text to tokens for evaluation, with the marks that begin and end documents in training."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from peerlm.data.encoder import TextEncoder
from peerlm.data.text_loss import TextLoss
from peerlm.data.tokenizer import pieces
from peerlm.errors import UserError
from peerlm.marks import Marks, document_marks

_PIECES_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class EncodedText:
    """Documents as tokens."""

    documents: tuple[Tensor, ...]
    """Of each document (length,) int64, without marks; documents without tokens are left out."""
    marks: Marks
    """What begins and ends a document."""
    bytes: int
    """UTF-8 bytes that the tokens stand for, without those of tokens that nothing predicts."""
    words: int
    """Whitespace-separated words of the documents."""
    loss: TextLoss = field(default_factory=TextLoss)
    """What the tokenizer lost of the text."""

    @cached_property
    def tokens(self) -> Tensor:
        """(length,) int64: the documents as one sequence, with their marks; the last one has no end."""
        return self._stream[0]

    @cached_property
    def scored(self) -> Tensor:
        """(length,) bool: which of `tokens` belong to a document."""
        return self._stream[1]

    @cached_property
    def _stream(self) -> tuple[Tensor, Tensor]:
        between = self.marks.start if self.marks.streamed else (*self.marks.end, *self.marks.start)
        parts, scored = [], []
        for number, document in enumerate(self.documents):
            mark = torch.tensor(between if number else self.marks.start, dtype=torch.int64)
            parts += [mark, document]
            scored += [torch.zeros(len(mark), dtype=torch.bool), torch.ones(len(document), dtype=torch.bool)]
        return torch.cat(parts), torch.cat(scored)


def encode(
    tokenizer: PreTrainedTokenizerFast,
    documents: Iterable[str | Iterable[str]],
    marks: Marks | None = None,
    *,
    limit: int | None = None,
    name: str = "the text",
) -> EncodedText:
    """Tokenize documents in sequence, up to `limit` of their tokens.

    The limit cuts the last document there, between two tokens; a character whose bytes fall on both sides is
    not counted in the bytes.

    Args:
        tokenizer: of the model.
        documents: texts, or each the parts of one, of which no more are read than the limit asks for; what is within
            one is text, even where it spells out a special token.
        marks: what begins and ends a document; default: as the tokenizer says.
        limit: tokens of the documents; default: all.
        name: what warnings call the text.

    Raises:
        UserError: what was read holds no words, or no tokens; or as `check_limit`.

    Warns:
        PeerlmWarning: part of the text does not come back from its tokens.
    """
    check_limit(limit)
    marks = marks or document_marks(tokenizer)
    encoder = TextEncoder(tokenizer)
    found: list[Tensor] = []
    num_tokens = num_bytes = num_words = 0
    for document in documents:
        read_texts: list[str] = []
        ids: list[int] = []
        dropped = 0
        for group in _groups(pieces(document)):
            texts, continues = group, [number > 0 for number in range(len(read_texts), len(read_texts) + len(group))]
            encoded = encoder.encode(texts, continues)
            room = None if limit is None else limit - num_tokens - len(ids)
            enough = room is not None and sum(map(len, encoded)) > room
            if enough:
                texts, encoded = _cut(encoder, texts, encoded, continues, room or 0)
            dropped += sum(encoder.account(texts, encoded, continues[: len(texts)]))
            read_texts += texts
            ids += [token for part in encoded for token in part]
            if enough:
                break
        if ids:
            found.append(torch.tensor(ids))
            read = "".join(read_texts)
            if not marks.start:  # nothing predicts the first token
                read = read[encoder.first.encode(read_texts[0], add_special_tokens=False).offsets[0][1] :]
            num_tokens += len(ids)
            num_bytes += len(read.encode()) - dropped
            num_words += len(read.split())
        if num_tokens == limit:
            break
    if not num_words or num_bytes < 1:
        where = "" if limit is None else f" in its first {limit} tokens"
        if encoder.loss.dropped:
            raise UserError(f"the tokenizer has no tokens for the words of {name}{where}; give text of its language")
        raise UserError(f"the text has no words{where}; give one that has")
    encoder.warn(name)
    return EncodedText(documents=tuple(found), marks=marks, bytes=num_bytes, words=num_words, loss=encoder.loss)


def check_limit(limit: int | None) -> None:
    """UserError unless the limit is at least 1 token."""
    if limit is not None and limit < 1:
        raise UserError(f"the limit is {limit} tokens; it must be at least 1")


def _groups(texts: Iterator[str]) -> Iterator[list[str]]:
    """Some at a time, to be tokenized in parallel; few first, where a limit may end it."""
    size = 1
    while group := list(islice(texts, size)):
        yield group
        size = min(2 * size, _PIECES_AT_ONCE)


def _cut(
    encoder: TextEncoder, texts: list[str], encoded: list[list[int]], continues: list[bool], room: int
) -> tuple[list[str], list[list[int]]]:
    """The first `room` tokens of pieces of a document, and the text that they stand for."""
    kept_texts, kept_ids = [], []
    for text, ids, continued in zip(texts, encoded, continues, strict=True):
        if len(ids) > room:
            engine = encoder.rest if continued else encoder.first
            kept_texts.append(text[: engine.encode(text, add_special_tokens=False).offsets[room][0]])
            kept_ids.append(ids[:room])
            break
        kept_texts.append(text)
        kept_ids.append(ids)
        room -= len(ids)
    return kept_texts, kept_ids
