"""Tokenizers: learned from text, opened from a folder or file, loaded beside the shards they made."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peerlm.data.manifest import TOKENIZER_FOLDER, Manifest, file_sha256
from peerlm.errors import UserError
from peerlm.marks import Marks

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257
"""The 256 bytes and the end-of-text token."""
TOKENIZER_FILE = "tokenizer.json"

_PIECE_CHARACTERS = 2**16
_CUT = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])")
_CUT_MARGIN = 4096


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learned from the texts; any text goes in and comes out unchanged.

    `<|endoftext|>` is its end, begin and padding token, id 0; ids 1 to 256 are the bytes.

    Args:
        texts: read once, in order.
        vocab_size: at least 257; fewer tokens come out where the texts are too short to learn that many.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
    return _wrap(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def open_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """A tokenizer from a folder that transformers saved, or from a tokenizer.json.

    Its end-of-text token is the one its configuration names, or else `<|endoftext|>` where the vocabulary has
    that.

    Raises:
        UserError: nothing there, an unreadable file, or no end-of-text token.
    """
    from transformers import PreTrainedTokenizerFast

    file = tokenizer_file(path)
    if not file.is_file():
        raise UserError(f"{path} has no tokenizer: name a {TOKENIZER_FILE} or a folder with one")
    try:
        if Path(path).is_dir():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        else:
            tokenizer = _wrap(tokenizer_file=str(file))
    except Exception as error:  # the tokenizers library raises bare Exception
        detail = " ".join(str(error).split())
        raise UserError(f"{file} is not a tokenizer that can be read ({detail}): restore it") from error
    if tokenizer.eos_token is None and END_OF_TEXT in tokenizer.get_vocab():
        tokenizer.eos_token = END_OF_TEXT
    if tokenizer.eos_token is None:
        raise UserError(
            f"{path} names no end-of-text token: name its eos_token in tokenizer_config.json, or add {END_OF_TEXT}"
        )
    return tokenizer


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder that `prepare` wrote.

    Raises:
        UserError: an absent or corrupt manifest, or a tokenizer that is missing, unreadable, or not the one
            that made the shards.
    """
    path = Path(folder) / TOKENIZER_FOLDER
    manifest = Manifest.read(folder)
    if tokenizer_file(path).is_file() and file_sha256(tokenizer_file(path)) != manifest.tokenizer_sha256:
        raise UserError(
            f"{tokenizer_file(path)} is not the tokenizer that made these shards (its hash differs from the "
            "manifest's): restore it, or prepare the folder again"
        )
    return open_tokenizer(path)


def tokenizer_file(path: str | Path) -> Path:
    """The tokenizer.json that a folder or file path means."""
    return Path(path) / TOKENIZER_FILE if Path(path).is_dir() else Path(path)


def encoder(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of the tokenizer's engine that takes all text as text.

    It adds and cuts nothing, and offsets of its tokens include their spaces. Where a document spells out a special
    token, this does not become the token.
    """
    from tokenizers import Tokenizer

    engine = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    engine.post_processor = None  # it adds marks, and takes leading spaces off the offsets
    engine.no_padding()
    engine.no_truncation()
    engine.encode_special_tokens = True
    return engine


def begin_with(tokenizer: PreTrainedTokenizerFast, start: Sequence[int]) -> None:
    """Make these token ids, and no others, what the tokenizer itself puts before a text, and nothing after it."""
    from tokenizers.processors import TemplateProcessing

    names = [f"start{number}" for number in range(len(start))]
    special = [{"id": name, "ids": [token], "tokens": [name]} for name, token in zip(names, start, strict=True)]
    single = " ".join([*names, "$A"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, pair=f"{single} $B", special_tokens=special
    )


def keep_start(tokenizer: PreTrainedTokenizerFast, marks: Marks, usual: Marks) -> None:
    """Where documents begin otherwise than usual, make that the tokenizer's template, for all who read with it."""
    if marks.start != usual.start:
        begin_with(tokenizer, marks.start or marks.end)


def pieces(text: str | Iterable[str]) -> Iterator[str]:
    """Cut a long text, so that tokenizing it runs in parallel and in bounded memory.

    The cut comes before a space between two letters, where byte-level tokenizers begin a new word anyway. So the pieces
    have the tokens of the whole; text without one for 4,096 characters is cut where the piece is full, which may split
    one token in two. A text may come in parts of any lengths, of which no more are read than the next piece needs.
    """
    read, start = "", 0
    for part in [text] if isinstance(text, str) else text:
        read, start = read[start:] + part, 0
        while len(read) - start > _PIECE_CHARACTERS:
            full = start + _PIECE_CHARACTERS
            cuts = [match.start() for match in _CUT.finditer(read, max(full - _CUT_MARGIN, start + 1), full)]
            stop = cuts[-1] if cuts else full
            yield read[start:stop]
            start = stop
    yield read[start:]


def _wrap(**arguments: object) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(clean_up_tokenization_spaces=False, **arguments)
