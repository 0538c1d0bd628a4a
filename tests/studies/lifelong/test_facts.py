"""Facts learned late: articles, clozes, and the experiment on a corpus of made-up countries."""

import math
from pathlib import Path
from typing import Any

import pytest

from peerlm.data import read_documents
from peerlm_studies.lifelong import facts as lifelong_facts
from peerlm_studies.lifelong.facts import (
    article_text,
    articles,
    choose_countries,
    learn_facts,
    markdown_facts,
    questions,
    write_texts,
)
from peerlm_studies.lifelong.plan import load_plan

ARTICLE = (
    "C&ocirc;te Nord\nBackground: Long ago. Much: happened.\nLocation: in the north; cold\nClimate: harsh (windy)\n"
    "name: Portville\netymology: a port\nCurrency: shells per US dollar -\nno field here"
)


def test_articles_are_lines_of_field_and_value() -> None:
    found = articles([ARTICLE, "A Novel\nLocation: nowhere\nIt was late.", "none\n" + ARTICLE.partition("\n")[2]])
    assert list(found) == ["Côte Nord"]
    fields = found["Côte Nord"]
    assert fields["Capital"] == "Portville"
    assert "Background" not in fields
    text = article_text("Côte Nord", fields)
    assert text.splitlines()[0] == "Côte Nord - Location: in the north; cold"
    assert questions("Côte Nord", fields) == [
        ("Côte Nord - Location:", "in the north"),
        ("Côte Nord - Capital:", "Portville"),
        ("Côte Nord - Climate:", "harsh"),
        ("Côte Nord - Currency:", "shells per US dollar -"),
    ]


def test_the_choice_depends_on_names_alone() -> None:
    names = [f"Land {number}" for number in range(50)]
    chosen = choose_countries(names, 10)
    assert chosen == choose_countries(names[::-1], 10)
    assert len(set(chosen)) == 10


def test_the_embedded_corpus_has_the_articles(tmp_path: Path) -> None:
    base, late, asked = write_texts(list(read_documents(["demo"])), tmp_path, 40)
    late_text, base_text = late.read_text(), base.read_text()
    assert late_text.count("<|endoftext|>") == 40
    assert len(asked) > 250
    assert "<|endoftext|>\n" in base_text
    for before, value in asked:
        assert f"{before} {value}" in late_text
        assert before not in base_text
    written = base.stat().st_mtime_ns
    write_texts(list(read_documents(["demo"])), tmp_path, 40)
    assert base.stat().st_mtime_ns == written


RECIPE = """
run = "{folder}/out"
data = {{ folder = "-", vocab_size = 300, context = 16, batch_size = 4, holdout = 0.1 }}
budget = {{ steps = 3 }}
[model]
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
ffw_layers = "peer"
peer = {{ num_experts = 64, heads = 2, experts_per_head = 2, key_dim = 8 }}
[lifelong]
base = "a"
orders = [["b"]]
[lifelong.domains]
a = {{ text = ["a.txt"], heldout = "a.txt" }}
b = {{ text = ["b.txt"], heldout = "b.txt" }}
[learn]
budget = {{ steps = 2 }}
[methods.full]
method = "full"
[facts]
countries = 3
methods = ["full"]
prose = "{folder}/prose.txt"
lambada = "{folder}/lambada.jsonl"
budget = {{ steps = 20 }}
"""


def test_each_method_is_asked_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = [
        f"Land {chr(65 + number)}\nLocation: place {number}\nClimate: {'warm' * (1 + number % 3)}\n"
        f"name: Town {number}\nCurrency: coin {number}"
        for number in range(12)
    ]
    novels = [f"Chapter {number}. " + "and so it went on " * 40 for number in range(4)]
    monkeypatch.setattr(lifelong_facts, "read_documents", lambda sources: [*made_up, *novels])
    (tmp_path / "prose.txt").write_text(novels[0])
    (tmp_path / "lambada.jsonl").write_text('{"context": "and so it went", "continuation": "on"}\n')
    (tmp_path / "recipe.toml").write_text(RECIPE.format(folder=tmp_path))
    plan = load_plan(tmp_path / "recipe.toml")
    assert plan.facts is not None
    rows = learn_facts(plan, plan.facts, progress=False)
    assert [row["stage"] for row in rows] == [None, "countries"]
    before, after = rows
    assert after["asked"]["perplexity"] < before["asked"]["perplexity"]
    assert after["loss"]["countries"] < before["loss"]["countries"]
    table = markdown_facts(rows)
    assert f"| full, 0 | countries | {math.log(after['asked']['perplexity']):.1f} |" in table

    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(lifelong_facts, "learn", never)
    assert learn_facts(plan, plan.facts, progress=False) == rows
