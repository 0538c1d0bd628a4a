"""Where tokens begin in a text, as `text_offset` of log-probabilities says it."""

import codecs

from peerlm.serve.http.texts import Texts


class Offsets:
    """The place of each token of a text, in characters, one token after another.

    Tokens that are parts of one character begin where it does. Those that the text leaves out, such as one that begins
    a document, have the place of the next.
    """

    def __init__(self, texts: Texts) -> None:
        self._texts = texts
        self._place = 0
        self._begun = codecs.getincrementaldecoder("utf-8")("replace")

    def next(self, token: int, within: str | None = None) -> int:
        """The place of the next token; `within` is the text where it is known already, as that of a prompt is."""
        place = self._place
        self._place += self._length(token, within)
        return place

    def _length(self, token: int, within: str | None) -> int:
        text, content = self._texts.token(token)
        if within is not None:
            for shown in (text, text.removeprefix(" ")):  # texts begin without the space of their first word
                if within.startswith(shown, self._place):
                    return len(shown)
        if token in self._texts.special:
            return 0
        return len(text if content is None else self._begun.decode(content))
