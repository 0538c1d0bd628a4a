"""Text files as windows of tokens, for what learns from a model's hidden states."""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from peerlm.errors import UserError
from peerlm.evaluate.encoding import encode
from peerlm.evaluate.files import PASSAGE, fields_of, read_documents
from peerlm.marks import Marks, document_marks


def text_windows(
    tokenizer: PreTrainedTokenizerFast, files: Sequence[str | Path], context: int, marks: Marks | None = None
) -> Tensor:
    """The documents of text, JSONL or parquet files in sequence, cut into windows: (number, context) int64.

    `marks` begin and end documents, and begin windows (default: as the tokenizer says). What is left over at the end is
    dropped.

    Raises:
        UserError: a file that cannot be read or holds no documents.
    """
    marks = marks or document_marks(tokenizer)
    documents = []
    for file in map(Path, files):
        fields = fields_of(file)
        if fields == PASSAGE:
            raise UserError(f"{file} holds passages and no documents; name a text, JSONL or parquet file of documents")
        documents.append(read_documents(file, fields))
    name = ", ".join(Path(file).name for file in files)
    tokens = encode(tokenizer, chain.from_iterable(documents), marks, name=name).tokens
    tokens = begin_windows(tokens, context, marks.window_start)
    return tokens[: len(tokens) // context * context].view(-1, context)


def begin_windows(tokens: Tensor, context: int, start: Sequence[int]) -> Tensor:
    """Put the mark that begins windows into a sequence, so that every `context` tokens begin with it.

    Where a document begins with the mark at that very place, there is one. Without a mark the sequence is as it was.

    Args:
        tokens: (length,) int64.
        context: tokens of a window, more than those of the mark.
        start: token ids of the mark.

    Raises:
        UserError: a context with no room beside the mark.
    """
    if not start:
        return tokens
    if len(start) >= context:
        raise UserError(f"the context is {context}, but {len(start)} tokens begin each window; take more than that")
    mark = torch.tensor(start)
    parts, place = [], 0
    while place < len(tokens):
        begun = torch.equal(tokens[place : place + len(mark)], mark)
        part = tokens[place : place + context - (0 if begun else len(mark))]
        parts += [part] if begun else [mark, part]
        place += len(part)
    return torch.cat(parts)


def batches_of(windows: Tensor, batch_size: int = 8) -> Iterator[dict[str, Tensor]]:
    """Windows as keyword arguments of forward passes, some at a time."""
    return ({"input_ids": batch} for batch in windows.split(batch_size))
