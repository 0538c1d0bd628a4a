"""Caches of prompts that were read before, for requests that begin alike."""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from transformers import DynamicCache

from peerlm.serve.additions import Choice
from peerlm.serve.cache import cache_bytes, first_tokens

LEAST = 16
"""Tokens; a shorter prefix is read again."""
_Tokens = np.ndarray[tuple[int], np.dtype[np.int64]]


class Prefixes:
    """The caches of sequences that were read, least recently used dropped first.

    Args:
        limit: most bytes.
        bytes_per_token: of a cache of one row.
    """

    def __init__(self, limit: int, bytes_per_token: int):
        self._most_tokens = limit // max(bytes_per_token, 1)
        self._tokens = 0
        self._kept: OrderedDict[int, tuple[Choice, _Tokens, DynamicCache]] = OrderedDict()
        self._next = 0

    def find(self, choice: Choice, prompt: Sequence[int]) -> tuple[int, DynamicCache | None]:
        """The longest beginning of a prompt that is kept: its number of tokens, and its cache.

        The last token is none of them, as its logits are wanted.
        """
        wanted = np.asarray(prompt[:-1], dtype=np.int64)
        best, number = LEAST - 1, None
        for key, (made_with, tokens, _) in self._kept.items():
            if made_with == choice and (same := _common(tokens, wanted)) > best:
                best, number = same, key
        if number is None:
            return 0, None
        self._kept.move_to_end(number)
        return best, first_tokens(self._kept[number][2], best)

    def wants(self, choice: Choice, tokens: Sequence[int]) -> bool:
        """Whether these tokens are worth a place: there is room, and no kept sequence begins with them."""
        if not LEAST <= len(tokens) <= self._most_tokens:
            return False
        own = np.asarray(tokens, dtype=np.int64)
        return all(made_with != choice or _common(kept, own) < len(own) for made_with, kept, _ in self._kept.values())

    def keep(self, choice: Choice, tokens: Sequence[int], cache: DynamicCache) -> None:
        """Keep the cache of a sequence, of one row; those that are beginnings of it are dropped."""
        own = np.asarray(tokens, dtype=np.int64)
        for key, (made_with, kept, _) in list(self._kept.items()):
            if made_with == choice and _common(kept, own) == len(kept):
                self._drop(key)
        self._kept[self._next] = (choice, own, cache)
        self._next += 1
        self._tokens += len(own)
        while self._tokens > self._most_tokens:
            self._drop(next(iter(self._kept)))

    def forget(self, name: str) -> None:
        """Drop what was made with a pack, an adapter or a library."""
        for key, (choice, _, _) in list(self._kept.items()):
            used = {*choice.packs, *(adapter.partition("/")[0] for adapter, _ in choice.adapters)}
            if name in used:
                self._drop(key)

    def bytes(self) -> int:
        """Memory that it has now."""
        return sum(cache_bytes(cache) for _, _, cache in list(self._kept.values()))

    def _drop(self, key: int) -> None:
        self._tokens -= len(self._kept.pop(key)[1])


def _common(first: _Tokens, second: _Tokens) -> int:
    """How many tokens two sequences begin with alike."""
    least = min(len(first), len(second))
    differ = first[:least] != second[:least]
    return int(differ.argmax()) if differ.any() else least
