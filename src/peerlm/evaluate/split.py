"""The held-out documents of the data that a run was trained on, as text again."""

from collections.abc import Iterator
from pathlib import Path

from peerlm.data.shards import TokenShards
from peerlm.data.tokenizer import load_tokenizer
from peerlm.errors import UserError
from peerlm.evaluate.loading import model_folder, trained_on


def held_out_split(path: str | Path) -> TokenShards:
    """The held-out split of a run's data folder, as its configuration names it.

    Raises:
        UserError: `path` is no run, so that nothing says what it was trained on, or the folder is not there.
    """
    model_folder(path)  # says what is wrong where there is no model at all
    folder = trained_on(path)
    if folder is None:
        raise UserError(f"{path} does not say which data it was trained on: name a file to evaluate on")
    if not folder.is_dir():
        raise UserError(
            f"the data of {path}, {folder}, is not in {Path.cwd()}: run this where it was trained, or name a file"
        )
    return TokenShards(folder, "heldout")


def split_documents(split: TokenShards) -> Iterator[str]:
    """The text of each document, without special tokens."""
    tokenizer = load_tokenizer(split.folder)
    start = 0
    for end in map(int, split.document_ends):
        yield str(tokenizer.decode(split.tokens(start, end).tolist(), skip_special_tokens=True))
        start = end
