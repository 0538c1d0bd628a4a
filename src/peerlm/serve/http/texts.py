"""Between texts and token ids: prompts, chats, and single tokens as log-probabilities name them."""

import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from peerlm.chat import chat_ids
from peerlm.evaluate.sample import prompt_ids
from peerlm.marks import Marks
from peerlm.serve.http.problems import Problem
from peerlm.serve.text import special_tokens

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + place): byte for place, byte in enumerate(_HIDDEN)}
"""The character that stands for each byte in byte-level vocabularies."""


class Texts:
    """A tokenizer as the API needs it.

    Args:
        tokenizer: of the served model.
        marks: what begins a document.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, marks: Marks) -> None:
        self.tokenizer = tokenizer
        self.marks = marks
        self.token = lru_cache(maxsize=2**16)(self._token)

    @cached_property
    def special(self) -> frozenset[int]:
        """Tokens that written texts leave out."""
        return frozenset(special_tokens(self.tokenizer).values())

    @property
    def has_chat(self) -> bool:
        """Whether there is a chat template."""
        return bool(self.tokenizer.chat_template)

    def ids(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a prompt, begun as documents are if `special`."""
        if special:
            return prompt_ids(self.tokenizer, text, self.marks)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def chat_ids(self, messages: Sequence[dict[str, Any]], *, answer: bool = True) -> list[int]:
        """Token ids of a chat, by the tokenizer's template; with `answer`, up to where the next message begins.

        Raises:
            Problem: there is no template, or it refuses the messages, 400.
        """
        if not self.has_chat:
            raise Problem(
                400,
                "the tokenizer of this model has no chat template: use /v1/completions, or serve a model that has one",
                code="no_chat_template",
            )
        try:
            return chat_ids(self.tokenizer, messages, answer=answer)
        except ValueError as error:
            raise Problem(400, str(error), param="messages") from error

    def text(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _token(self, token_id: int) -> tuple[str, bytes | None]:
        r"""A token as text and as bytes; one that is no text alone is written as OpenAI does, `bytes:\xe7\x81`."""
        raw = str(self.tokenizer.convert_ids_to_tokens(token_id))
        text = self.text([token_id])
        if "\ufffd" not in text:
            if raw.startswith("▁") and not text.startswith(" "):
                text = " " + text
            return text, text.encode()
        if match := _BYTE_TOKEN.fullmatch(raw):
            content = bytes([int(match[1], 16)])
        elif all(character in _BYTES for character in raw):
            content = bytes(_BYTES[character] for character in raw)
        else:
            return text, None
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content), content
