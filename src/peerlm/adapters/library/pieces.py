"""Texts of an adapter's domain, cut into pieces of token ids of one length."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Text = str | Tensor


def pieces_of(
    texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase | None, *, window: int, start: Sequence[int]
) -> list[Tensor]:
    """Pieces of at most `window` token ids, int64, of strings or of token ids (length,).

    A piece of a string begins with `start`. What is left over after whole pieces is dropped, unless it is all of a
    text.

    Raises:
        ValueError: there is no text, one that is no list, or strings and no tokenizer.
    """
    if isinstance(texts, (str, Tensor)):
        raise ValueError(f"texts is one {type(texts).__name__}; give a list of texts")
    pieces = []
    for text in texts:
        begins = torch.tensor(start if isinstance(text, str) else (), dtype=torch.int64)
        if isinstance(text, str):
            if tokenizer is None:
                raise ValueError("texts are strings, but the library has no tokenizer; give it one, or token ids")
            ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
        elif text.ndim != 1:
            raise ValueError(f"a text has token ids of shape {tuple(text.shape)}; give each text as (length,)")
        else:
            ids = text.long()
        room = window - len(begins)
        whole = len(ids) // room * room
        cut = ids[:whole].split(room) if whole else [ids] if len(ids) else []
        pieces += [torch.cat([begins, piece]) for piece in cut]
    if not pieces:
        raise ValueError("there is no text to make a key from; give at least one that is not empty")
    return pieces
