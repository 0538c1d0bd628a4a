"""Evaluation without files reads the documents that were held out of a run's data."""

import json
from pathlib import Path
from typing import Any

import pytest

from peerlm.data import TokenShards, prepare
from peerlm.errors import UserError
from peerlm.evaluate import evaluate
from peerlm.evaluate.split import held_out_split, split_documents

DOCUMENTS = [
    f"The old keeper of lamp {number} climbed {number * 7} stairs, a caf\u00e9 on each." for number in range(50)
]


@pytest.fixture
def run(saved: Path, tokenizer: Any, tmp_path: Path) -> Path:
    """A run's folder: a model, and a configuration that names the data."""
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(DOCUMENTS))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = {"tokenizer": tmp_path / "tokenizer", "holdout": 0.2, "progress": False}
    prepare([tmp_path / "text.txt"], tmp_path / "data", **options)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(saved)
    config = {"data": {"folder": str(tmp_path / "data"), "context": 16}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    return tmp_path / "run"


def test_documents_are_those_that_were_held_out(run: Path) -> None:
    split = held_out_split(run)
    documents = list(split_documents(split))
    assert len(documents) == len(TokenShards(split.folder, "heldout").document_ends) >= 5
    assert set(documents) < set(DOCUMENTS)


def test_a_row_as_of_a_file_of_these_documents(run: Path, tmp_path: Path) -> None:
    (name, row), *others = evaluate(run, [], progress=False).items()
    assert name == f"held out of {tmp_path / 'data'}"
    assert others == []
    documents = split_documents(held_out_split(run))
    (tmp_path / "heldout.txt").write_text("\n<|endoftext|>\n".join(documents))
    assert evaluate(run, [tmp_path / "heldout.txt"], progress=False) == {str(tmp_path / "heldout.txt"): row}
    (limited,) = evaluate(run, [], limit=20, progress=False).values()
    assert limited["tokens"] == 20


def test_what_has_no_held_out_split_is_named(run: Path, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model does not say which data it was trained on: name a file"):
        evaluate(saved, [], progress=False)
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"the data of .*run, .*data, is not in .*: run this where it was trained"):
        evaluate(run, [], progress=False)
