"""The texts of a stream as windows of tokens: prepared once, with the model's own tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from peerlm.data import TokenShards, TokenWindows, prepare
from peerlm.errors import UserError
from peerlm.evaluate.held_out import Windows
from peerlm.evaluate.windows import text_windows
from peerlm.marks import AUTO, marks_in

SHARE = 0.02
"""Share of a text to hold out, where no other file is measured on."""
LEAST_BYTES = 16
"""Bytes to hold out of a short text, times the context: about four windows."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """Windows to learn from, and windows to measure on."""

    train: TokenWindows
    heldout: Windows


def read_text(
    files: Sequence[str],
    heldout: str | None,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerFast,
    tokenizer_folder: Path,
    context: int,
    document_start: str = AUTO,
    progress: bool,
) -> Text:
    """Prepare files into `folder`, unless that has happened, and open them; a held-out file is read whole.

    Raises:
        UserError: files that cannot be read, or hold less than one window.
    """
    holdout = SHARE if heldout is None else None
    prepare(
        files,
        folder,
        tokenizer=tokenizer_folder,
        holdout=holdout,
        document_start=document_start,
        heldout_bytes=LEAST_BYTES * context,
        progress=progress,
    )
    train = TokenWindows(TokenShards(folder, "train"), context)
    if heldout is None:
        return Text(train=train, heldout=TokenWindows(TokenShards(folder, "heldout"), context))
    windows = text_windows(tokenizer, [heldout], context, marks_in(tokenizer_folder, tokenizer, document_start))
    if not len(windows):
        raise UserError(f"{heldout} has less than one window of {context} tokens: name more text")
    return Text(train=train, heldout=windows)
