"""Scripts that teach a pretrained model, on a tiny random one: their rows, and what they ask."""

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peerlm.data.tokenizer import train_tokenizer

FOLDER = Path(__file__).parents[2] / "benchmarks"
ARTICLE = """{name}
Background: Some words of history.
Location: {place}, between hills
Climate: {climate}; rain in winter
Currency: {money}
name: {capital}
Independence: none
"""
COUNTRIES = [
    {"name": "Erewhon", "place": "Far South", "climate": "mild", "money": "crowns", "capital": "Nowhere"},
    {"name": "Ruritania", "place": "Central Europe", "climate": "cold", "money": "thalers", "capital": "Strelsau"},
]
BOOK = "the cat sat on a mat and saw rain fall on one small bird " * 12
RUN = ["--context", "16", "--batch-size", "2", "--precision", "fp32", "--learning-rate", "1e-2"]
PACK = ["experts=16", "gate_tokens=64"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Imports a script; called with its module, and arguments, its `main`."""
    monkeypatch.syspath_prepend(FOLDER)
    before = set(sys.modules)

    def run(module: Any, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        module.main()

    yield run
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([BOOK, *(ARTICLE.format(**country) for country in COUNTRIES)], vocab_size=400)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=400,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_facts_are_asked_as_lines_and_as_sentences_before_and_after(
    script: Callable[..., Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = importlib.import_module("teach_facts")
    corpus = [BOOK, BOOK[30:], *(ARTICLE.format(**country) for country in COUNTRIES)]
    monkeypatch.setattr(facts, "documents", lambda: corpus)
    (tmp_path / "other.txt").write_text(BOOK[50:])
    arguments = [model, "--countries", 2, *RUN, "--tokens", 128, "--output", tmp_path, "--json", tmp_path / "rows"]
    arguments += ["--other", tmp_path / "other.txt", "--method"]
    script(facts, *arguments, "pack", "--set", *PACK)
    script(facts, *arguments, "full")
    rows = rows_of(tmp_path / "rows")
    script(facts, *arguments, "full")
    assert rows_of(tmp_path / "rows") == rows  # a run that has a row is not made again
    assert [row["method"] for row in rows] == ["pack", "full"]
    assert rows[0]["asked"]["cloze"]["before"] == rows[1]["asked"]["cloze"]["before"]
    for row in rows:
        assert row["asked"]["cloze"]["after"]["nats"] < row["asked"]["cloze"]["before"]["nats"]
        assert row["loss"]["other.txt"]["before"] == rows[0]["loss"]["other.txt"]["before"]
    assert set(rows[0]["open"]) == {"cloze", "sentence"}
    assert rows[1]["open"] is None
    text = (tmp_path / "countries-2.txt").read_text()
    assert "Erewhon - Capital: Nowhere\n" in text
    assert "rain" not in text  # values are cut at their first semicolon
    assert "none" not in text
    assert "Erewhon" not in (tmp_path / "background.txt").read_text()
    questions = facts.asked(facts.chosen(corpus, 2))
    assert ("The capital of Ruritania is", "Strelsau") in questions["sentence"]
    assert ("Ruritania - Capital:", "Strelsau") in questions["cloze"]


def test_many_packs_are_measured_on_their_texts_and_on_mixed_text(
    script: Callable[..., Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = importlib.import_module("many_packs")
    monkeypatch.setattr(many, "SEGMENT", 4)
    for number, name in enumerate(("one", "two")):
        (tmp_path / f"{name}.txt").write_text(BOOK[number * 7 :] if number else ARTICLE.format(**COUNTRIES[0]) * 8)
    (tmp_path / "book.txt").write_text(f"{BOOK}\n<|endoftext|>\n{BOOK[9:]}")
    arguments = [model, "--text", tmp_path / "one.txt", tmp_path / "two.txt", "--background", tmp_path / "book.txt"]
    arguments += [*RUN, "--tokens", 60, "--held-out-tokens", 60, "--set", *PACK]
    script(many, *arguments, "--output", tmp_path / "runs", "--json", tmp_path / "rows")
    one, two, mixed = rows_of(tmp_path / "rows")
    assert [row["text"] for row in (one, two, mixed)] == ["one", "two", "mixed"]
    assert one["own"] != one["none"]
    assert one["own_and_next"] == one["all"]  # there are two
    assert all(row["bits_restored"] for row in (one, two, mixed))
    assert set(one["open"]) == {"one", "two"}
    assert 0 <= mixed["other_open"] <= 1
    script(many, *arguments, "--output", tmp_path / "runs", "--json", tmp_path / "rows")
    assert len(rows_of(tmp_path / "rows")) == 3
    script(many, *arguments, "--in-a-row", "--output", tmp_path / "runs", "--json", tmp_path / "rows")
    stream = rows_of(tmp_path / "rows")[3]
    assert [stage["after"] for stage in stream["stages"]] == [None, "one", "two"]
    assert stream["stages"][0]["loss"].keys() == {"background", "one", "two"}


def test_mixed_text_takes_turns(script: Callable[..., Any]) -> None:
    many = importlib.import_module("many_packs")
    texts = [torch.full((1, 192), number) for number in range(3)]
    assert many.mixed(texts)[:, :: many.SEGMENT].tolist() == [[0, 1, 2], [1, 2, 0], [2, 0, 1]]
