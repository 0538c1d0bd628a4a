"""Documents that a stream is measured on and trains on are found, whatever their white space."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from peerlm.continual import LearnConfig, learn
from peerlm.continual.overlap import Sources, warn_of_overlap
from peerlm.data import prepare
from peerlm.errors import PeerlmWarning

DOCUMENTS = [f"number {number} of the ships that sailed to the {number * number} seas" for number in range(40)]


def write(path: Path, documents: list[str]) -> str:
    path.write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8", newline="")
    return str(path)


def found(sources: Sources, data: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        warn_of_overlap(sources, data)
    assert all(each.category is PeerlmWarning for each in told)
    return [str(each.message) for each in told]


def test_a_heldout_file_with_documents_of_its_text(tmp_path: Path) -> None:
    text = write(tmp_path / "a.txt", DOCUMENTS[:30])
    copies = [DOCUMENTS[0] + " \r", "\ufeff" + DOCUMENTS[1].replace(" ", "\n"), *DOCUMENTS[30:38]]
    heldout = write(tmp_path / "b.txt", copies)
    (said,) = found({"ships": ([text], heldout)}, tmp_path)
    assert said.startswith("2 of the 10 documents that ships is measured on are in the text of ships, which is trained")
    assert found({"ships": ([text], write(tmp_path / "c.txt", DOCUMENTS[30:]))}, tmp_path) == []


def test_a_text_that_holds_what_was_held_out_of_another(tmp_path: Path) -> None:
    first = write(tmp_path / "a.txt", DOCUMENTS[:30])
    prepare([first], tmp_path / "first", holdout=0.2, vocab_size=300, progress=False)
    second = write(tmp_path / "b.txt", DOCUMENTS[:35])
    heldout = write(tmp_path / "c.txt", DOCUMENTS[35:])
    told = found({"first": ([first], None), "second": ([second], heldout)}, tmp_path)
    (said,) = told
    assert "documents that first is measured on are in the text of second" in said
    number, total = (int(said.split()[place]) for place in (0, 3))
    assert number == total > 3


def test_a_stream_says_so_once(configure: Callable[..., LearnConfig], texts: Path) -> None:
    config = configure(only=1)
    (stage,) = config.stages
    config = replace(config, stages=(replace(stage, heldout=str(texts / "code.txt")),))
    with pytest.warns(PeerlmWarning, match="30 of the 30 documents that code is measured on are in the text of code"):
        learn(config, progress=False)
    learn(config, resume=True, progress=False)
