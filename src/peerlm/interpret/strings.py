"""Tokens as people read them, each distinct string once."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

_BROKEN = "\ufffd"
"""What a decoder writes for bytes that are no character."""
_MOST_PARTS = 4
"""Tokens that one character of UTF-8 may be spread over."""


class TokenStrings:
    """A table of strings that grows as tokens are looked up.

    Attributes:
        strings: the distinct strings so far.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.strings: list[str] = []
        self._tokenizer = tokenizer
        self._place_of: dict[str, int] = {}
        self._string_of: dict[int, str] = {}
        # Decoded after another token, so that decoders which take a leading space off a text leave the token's.
        self._before = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._cut = len(self._decode(self._before))

    def vocabulary(self, ids: Tensor) -> Tensor:
        """Places in `strings` of tokens of any shape, each read by itself."""
        distinct, inverse = ids.unique(return_inverse=True)
        return torch.tensor([self._place(self.string(token)) for token in distinct.tolist()])[inverse]

    def text(self, ids: Sequence[int]) -> list[int]:
        """Places in `strings` of tokens that stand in a text.

        Where several tokens are one character, the last of them gets it, and the others an empty string.
        """
        read = [self.string(token) for token in ids]
        for first, string in enumerate(read):
            if _BROKEN not in string:
                continue
            for last in range(first + 1, min(first + _MOST_PARTS, len(ids))):
                whole = self._decode([*self._before, *ids[first : last + 1]])[self._cut :]
                if _BROKEN not in whole:
                    read[first : last + 1] = [*([""] * (last - first)), whole]
                    break
        return [self._place(string) for string in read]

    def string(self, token: int) -> str:
        """One token, read by itself."""
        if token not in self._string_of:
            self._string_of[token] = self._decode([*self._before, token])[self._cut :]
        return self._string_of[token]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def _place(self, string: str) -> int:
        if string not in self._place_of:
            self._place_of[string] = len(self.strings)
            self.strings.append(string)
        return self._place_of[string]
