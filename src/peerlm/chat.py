"""A chat as the template of a tokenizer writes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peerlm.errors import UserError
from peerlm.marks import AUTO

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_chat(tokenizer: PreTrainedTokenizerBase, document_start: str = AUTO) -> None:
    """Raise UserError where a tokenizer has no chat template, or somebody else is to say what begins a chat."""
    if document_start != AUTO:
        raise UserError(
            f"--document-start is {document_start!r}, but the chat template says what begins a chat: leave out one of "
            "--document-start and --chat"
        )
    if not tokenizer.chat_template:
        raise UserError("the tokenizer of this model has no chat template: leave out --chat, or name a model that has")


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], *, answer: bool = True
) -> list[int]:
    """Token ids of a chat, by the tokenizer's template; with `answer`, up to where the next message begins.

    Args:
        tokenizer: with a chat template.
        messages: with "role" and "content" each, as transformers takes them.
        answer: whether the beginning of an assistant's message follows.

    Raises:
        ValueError: the template refuses the messages.
    """
    try:
        ids: Any = tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=answer, tokenize=True, return_dict=False
        )
    except Exception as error:  # templates are programs of others
        raise ValueError(f"the chat template refuses these messages: {error}") from error
    return list(ids)
