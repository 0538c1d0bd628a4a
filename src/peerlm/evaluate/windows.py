"""Text files as windows of tokens, for what learns from a model's hidden states."""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from peerlm.errors import UserError
from peerlm.evaluate.encoding import encode
from peerlm.evaluate.files import PASSAGE, fields_of, read_documents


def text_windows(tokenizer: PreTrainedTokenizerFast, files: Sequence[str | Path], context: int) -> Tensor:
    """The documents of text, JSONL or parquet files in sequence, cut into windows: (number, context) int64.

    What is left over at the end is dropped.

    Raises:
        UserError: a file that cannot be read or holds no documents.
    """
    documents = []
    for file in map(Path, files):
        fields = fields_of(file)
        if fields == PASSAGE:
            raise UserError(f"{file} holds passages and no documents; name a text, JSONL or parquet file of documents")
        documents.append(read_documents(file, fields))
    tokens = encode(tokenizer, chain.from_iterable(documents)).tokens
    return tokens[: len(tokens) // context * context].view(-1, context)


def batches_of(windows: Tensor, batch_size: int = 8) -> Iterator[dict[str, Tensor]]:
    """Windows as keyword arguments of forward passes, some at a time."""
    return ({"input_ids": batch} for batch in windows.split(batch_size))
