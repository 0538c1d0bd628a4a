"""What begins and ends a document: by its tokenizer's template, the model's configuration, or the user's word."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peerlm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUTO, NONE = "auto", "none"
"""Words that may stand in place of a token: as tokenizer and model say; nothing."""

_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")
"""Names under which a tokenizer for chats keeps the token that parted documents in pretraining."""
_CHAT = [{"role": role, "content": "a"} for role in ("user", "assistant") * 2]


@dataclass(frozen=True, kw_only=True)
class Marks:
    """The tokens around a document."""

    start: tuple[int, ...]
    """Token ids before it; empty: nothing."""
    end: tuple[int, ...]
    """Token ids after it."""
    source: str
    """Where the start comes from, in words."""
    on_prompts: bool
    """Whether a prompt, too, gets the start: no where an end-of-text token alone parts documents."""

    @property
    def streamed(self) -> bool:
        """Whether one and the same mark parts documents, so that they are read as one stream, as in training."""
        return self.start == self.end

    @property
    def window_start(self) -> tuple[int, ...]:
        """Token ids at the beginning of every window: the start, unless documents are a stream."""
        return () if self.streamed else self.start

    @property
    def prompt_start(self) -> tuple[int, ...]:
        """Token ids before a prompt that is not empty."""
        return self.start if self.on_prompts else ()

    @property
    def reading(self) -> str:
        """How an evaluation reads documents, in words."""
        return "documents in sequence" if self.streamed else "each document alone"


def document_marks(
    tokenizer: PreTrainedTokenizerBase, bos_token_id: int | None = None, document_start: str = AUTO
) -> Marks:
    """The tokens before and after each document.

    With "auto" a document begins with the first of these that there is: what the tokenizer's template (its
    post-processor) puts there, the tokenizer's bos_token, the model's bos_token_id, the end-of-text token. It ends with
    what the template puts there, or else the end-of-text token.

    A token that the chat template writes at each turn begins a turn, no document, whatever it is called: such a
    bos_token is passed over. The end-of-text token is eos_token, or where that ends turns, <|endoftext|> or
    <|end_of_text|> if it is a special token.

    Args:
        tokenizer: without an end-of-text token (eos_token) and a template, nothing ends a document.
        bos_token_id: of the model's configuration; of no effect unless it is a special token of the tokenizer.
        document_start: "auto", "none", or a token of the vocabulary.

    Raises:
        UserError: `document_start` is no such thing.
    """
    before, after = template_of(tokenizer)
    turns = _turn_tokens(tokenizer)
    eos, eos_name = _end_of_text(tokenizer, turns)
    end = after or eos
    if document_start == NONE:
        return Marks(start=(), end=end, source="as asked", on_prompts=False)
    if document_start != AUTO:
        vocabulary = tokenizer.get_vocab()
        if document_start not in vocabulary:
            special = ", ".join(dict.fromkeys(tokenizer.all_special_tokens))
            raise UserError(
                f"--document-start is {document_start!r}, which is no token of this model; name one, such as "
                f"{special}, or {AUTO} or {NONE}"
            )
        return Marks(start=(vocabulary[document_start],), end=end, source="as asked", on_prompts=True)
    if before:
        return Marks(start=before, end=end, source="the tokenizer's template", on_prompts=True)
    start: tuple[int, ...]
    if tokenizer.bos_token_id is not None and tokenizer.bos_token_id not in turns:
        start, source = (tokenizer.bos_token_id,), "the tokenizer's bos_token"
    elif bos_token_id is not None and bos_token_id not in turns and _is_special(tokenizer, bos_token_id):
        start, source = (bos_token_id,), "the model's bos_token_id"
    else:
        start, source = eos, f"the tokenizer's {eos_name}"
    return Marks(start=start, end=end, source=source, on_prompts=start != end)


def marks_of(model: Any, tokenizer: PreTrainedTokenizerBase, document_start: str = AUTO) -> Marks:
    """`document_marks` with the bos_token_id of a model: of its (text) configuration, or else for generation."""
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = (getattr(where, "bos_token_id", None) for where in (text_config, getattr(model, "generation_config", None)))
    return document_marks(tokenizer, next(filter(_is_id, found), None), document_start)


def marks_in(folder: str | Path, tokenizer: PreTrainedTokenizerBase, document_start: str = AUTO) -> Marks:
    """`document_marks` with the bos_token_id that a saved model's folder names, where it is one."""
    found = []
    for name in ("config.json", "generation_config.json"):
        try:
            config = json.loads((Path(folder) / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(config, dict):
            text_config = config.get("text_config")
            found += [where.get("bos_token_id") for where in (text_config, config) if isinstance(where, dict)]
    return document_marks(tokenizer, next(filter(_is_id, found), None), document_start)


def template_of(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids that the tokenizer itself puts before and after a text."""
    for text in _probes(tokenizer):
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not plain:
            continue
        whole = tokenizer(text)["input_ids"]
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return tuple(whole[:start]), tuple(whole[start + len(plain) :])
    return (), ()


def _turn_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Which of bos_token and eos_token the chat template writes at each turn; empty where there is no such template."""
    if not tokenizer.chat_template:
        return set()
    try:
        text = str(tokenizer.apply_chat_template(_CHAT, tokenize=False))
    except Exception:  # templates are programs of others'; one that does not take this chat says nothing
        return set()
    own = {tokenizer.bos_token_id: tokenizer.bos_token, tokenizer.eos_token_id: tokenizer.eos_token}
    return {token for token, name in own.items() if token is not None and text.count(str(name)) > 1}


def _end_of_text(tokenizer: PreTrainedTokenizerBase, turns: set[int]) -> tuple[tuple[int, ...], str]:
    """The token that parts documents, and what it is called."""
    if tokenizer.eos_token_id is None:
        return (), "eos_token"
    if tokenizer.eos_token_id in turns:
        for name in _END_OF_TEXT:
            token = tokenizer.convert_tokens_to_ids(name)
            if isinstance(token, int) and token != tokenizer.eos_token_id and _is_special(tokenizer, token):
                return (token,), name
    return (tokenizer.eos_token_id,), "eos_token"


def marked(tokens: tuple[int, ...], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Token ids as people write them; None for none."""
    return "".join(map(str, tokenizer.convert_ids_to_tokens(list(tokens)))) or None


def _probes(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Texts of which one should have a token, in any vocabulary."""
    yield from ("a", "the", "0")
    special = set(tokenizer.all_special_tokens)
    yield from islice((token for token in tokenizer.get_vocab() if token not in special), 100)


def _is_id(value: object) -> bool:
    return isinstance(value, int)


def _is_special(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    """Whether a token id is one of the tokenizer's special tokens."""
    added = tokenizer.added_tokens_decoder.get(token)
    return token in tokenizer.all_special_ids or (added is not None and added.special)
