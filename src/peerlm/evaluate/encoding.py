"""Text to tokens for evaluation, as in training: an end-of-text token before each document."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from peerlm.data.tokenizer import encoder, pieces
from peerlm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EncodedText:
    """Documents as one sequence of tokens."""

    tokens: Tensor
    """(length,) int64, with an end-of-text token before each document."""
    scored: Tensor
    """(length,) bool: which tokens belong to a document."""
    bytes: int
    """UTF-8 bytes of the documents."""
    words: int
    """Whitespace-separated words of the documents."""


def encode(tokenizer: PreTrainedTokenizerFast, documents: Iterable[str], *, limit: int | None = None) -> EncodedText:
    """Tokenize documents in sequence, up to `limit` of their tokens.

    The limit cuts the last document there, between two tokens; a character whose bytes fall on both sides is
    not counted in the bytes. Raises UserError where that holds no words, or as `check_limit`.
    """
    check_limit(limit)
    engine = encoder(tokenizer)
    begin = torch.tensor([tokenizer.eos_token_id])
    parts: list[Tensor] = []
    num_tokens = num_bytes = num_words = 0
    for document in documents:
        texts = list(pieces(document))
        ids: list[int] = []
        read = ""
        for text, encoding in zip(texts, engine.encode_batch(texts, add_special_tokens=False), strict=True):
            room = len(encoding) if limit is None else min(len(encoding), limit - num_tokens - len(ids))
            ids += encoding.ids[:room]
            read += text if room == len(encoding) else text[: encoding.offsets[room][0]]
        if ids:
            parts += [begin, torch.tensor(ids)]
            num_tokens += len(ids)
            num_bytes += len(read.encode())
            num_words += len(read.split())
        if num_tokens == limit:
            break
    if not num_words:
        where = "" if limit is None else f" in its first {limit} tokens"
        raise UserError(f"the text has no words{where}; give one that has")
    scored = [torch.full((len(part),), part is not begin) for part in parts]
    return EncodedText(tokens=torch.cat(parts), scored=torch.cat(scored), bytes=num_bytes, words=num_words)


def check_limit(limit: int | None) -> None:
    """UserError unless the limit is at least 1 token."""
    if limit is not None and limit < 1:
        raise UserError(f"the limit is {limit} tokens; it must be at least 1")
