"""What studies print fits a terminal of 80 columns, with the rows of docs/results.md."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from peerlm.terminal import print_markdown
from peerlm_studies.comparison.tables import show_table, summarise
from peerlm_studies.isoflop.curves import curves_of, equal_seconds_table, optima_table, rows_of_curves
from peerlm_studies.isoflop.plan import load_isoflop
from peerlm_studies.isoflop.seconds import comparable_seconds
from peerlm_studies.isoflop.tables import equal_seconds_markdown, optima_markdown
from peerlm_studies.lifelong.facts import markdown_facts
from peerlm_studies.lifelong.study import markdown_lifelong
from peerlm_studies.lifelong.study import summarise as summarise_streams
from peerlm_studies.report.plan import load_report
from peerlm_studies.rows import read_rows

ROOT = Path(__file__).parents[2]


@pytest.fixture
def screen() -> Console:
    return Console(file=io.StringIO(), width=80)


def check(screen: Console, *names: str) -> None:
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for name in names:
        assert name in text


def test_a_comparison(screen: Console) -> None:
    rows = read_rows(ROOT / "results/compare.jsonl")
    show_table(summarise(rows), screen)
    check(screen, *{row["label"] for row in rows}, "validation ppl", "lambada_openai acc", "peak MiB")


def test_an_isoflop_study(screen: Console) -> None:
    report = load_report(ROOT / "results/report.toml")
    section = next(section for section in report.section if section.recipe == "recipes/isoflop.toml")
    plan = load_isoflop(ROOT / section.recipe, [*report.settings, *section.settings])
    curves = curves_of(plan, read_rows(ROOT / "results/isoflop.jsonl"))
    seconds = comparable_seconds(rows_of_curves(curves))
    table, equal_seconds = optima_table(curves, seconds), equal_seconds_table(curves, seconds)
    print_markdown(f"{optima_markdown(table)}\n{equal_seconds_markdown(equal_seconds)}", screen)
    check(screen, *(f"{row['flops']:.3g}, {row['method']}" for row in table), "optimal active parameters")


def test_lifelong_learning(screen: Console) -> None:
    rows = [{**row, "order": tuple(row["order"])} for row in read_rows(ROOT / "results/lifelong.jsonl")]
    summary = summarise_streams(rows, "full")
    print_markdown(markdown_lifelong(summary, rows, "prose"), screen)
    print_markdown(markdown_facts(read_rows(ROOT / "results/lifelong_facts.jsonl")), screen)
    check(screen, *(row["label"] for row in summary), "forgetting, nats", "values right")
