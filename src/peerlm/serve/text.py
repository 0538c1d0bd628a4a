"""Text of tokens that come one at a time: whole characters, and nothing that might begin a stop string."""

from collections.abc import Sequence
from typing import Any

CONTEXT = 6
"""Tokens of the prompt that the first token is decoded with: some tokenizers drop a space at the beginning."""
BROKEN = "\ufffd"


class TextStream:
    """Decodes tokens as they come. The parts that it gives, joined, are the decoded text up to a stop string.

    Args:
        tokenizer: of transformers.
        prompt: token ids before the text.
        stops: texts at which the text ends.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str]):
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._ids = list(prompt[-CONTEXT:])
        if self._decode(0).endswith(BROKEN):
            self._ids = []
        self._begin, self._read = 0, len(self._ids)
        self._held = ""

    def add(self, token_id: int, *, may_stop: bool = True) -> tuple[str, str | None]:
        """What can be shown after one token more, and the stop string that the text has come to."""
        self._ids.append(token_id)
        before = self._tokenizer.decode(self._ids[self._begin : self._read], **OPTIONS)
        now = self._decode(self._begin)
        if now.endswith(BROKEN):
            return "", None
        self._begin, self._read = self._read, len(self._ids)
        return self._shown(now[len(before) :], may_stop)

    def finish(self, *, may_stop: bool = True) -> tuple[str, str | None]:
        """What was kept back, where the text ends here."""
        before = self._tokenizer.decode(self._ids[self._begin : self._read], **OPTIONS)
        rest = self._decode(self._begin)[len(before) :]
        self._begin = self._read = len(self._ids)
        text, stop = self._shown(rest, may_stop)
        if stop is None:
            text, self._held = text + self._held, ""
        return text, stop

    def _decode(self, begin: int) -> str:
        return str(self._tokenizer.decode(self._ids[begin:], **OPTIONS))

    def _shown(self, text: str, may_stop: bool) -> tuple[str, str | None]:
        text = self._held + text
        self._held = ""
        if not may_stop or not self._stops:
            return text, None
        found = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if found:
            place, stop = min(found)
            return text[:place], stop
        kept = max(_overlap(text, stop) for stop in self._stops)
        if kept:
            text, self._held = text[:-kept], text[-kept:]
        return text, None


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """The tokens that the decoded text leaves out, by what they are called."""
    return {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}


OPTIONS = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of a text begin a stop string."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
