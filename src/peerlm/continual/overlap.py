"""Whether a stream is measured on documents that it trains on: a held-out file may hold what a text holds, too."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from peerlm.data import TokenShards
from peerlm.data.sources import read_documents as source_documents
from peerlm.data.split import copy_key
from peerlm.errors import PeerlmWarning
from peerlm.evaluate.files import fields_of, read_documents
from peerlm.evaluate.split import split_documents

Sources = Mapping[str, tuple[Sequence[str], str | None]]
"""By the name of a text: its files, and the file that it is measured on, None for documents held out of it."""


def warn_of_overlap(sources: Sources, data: Path) -> None:
    """Warn of documents that one text is measured on and another, or the same one, trains on.

    Documents are compared in normal form (`data.split.copy_key`). Those held out of a text are read from its tokens, so
    that a tokenizer that loses text hides copies of them.

    Args:
        sources: all texts of a stream.
        data: the folder with a prepared folder for each text, by its name.

    Warns:
        PeerlmWarning: for each two texts with such documents.
    """
    if len(sources) == 1 and all(heldout is None for _, heldout in sources.values()):
        return  # a text's own split keeps copies together
    measured, trained = {}, {}
    for name, (files, heldout) in sources.items():
        if heldout is None:
            measured[name] = _keys(split_documents(TokenShards(data / name, "heldout")))
        else:
            measured[name] = _keys(read_documents(Path(heldout), fields_of(Path(heldout))))
        trained[name] = _keys(source_documents(files))
        if heldout is None:
            trained[name] -= measured[name]
    for name, measured_on in measured.items():
        for other, trained_on in trained.items():
            if both := len(measured_on & trained_on):
                warnings.warn(
                    f"{both} of the {len(measured_on)} documents that {name} is measured on are in the text of "
                    f"{other}, which is trained on: take them out of one of both, or figures are too good",
                    PeerlmWarning,
                    stacklevel=2,
                )


def _keys(documents: Iterable[str]) -> set[int]:
    return {copy_key(document, 0) for document in documents}
