"""Tables on a terminal: whatever its width, nothing is cut short."""

import io
from typing import Any

import pytest
from rich.console import Console

from peerlm.terminal import print_markdown, print_table


def shown(subjects: dict[str, dict[str, Any]], width: int = 80, *, rows: bool = False, title: str = "") -> str:
    screen = io.StringIO()
    print_table(title, subjects, Console(file=screen, width=width), rows=rows)
    return screen.getvalue()


FEW = {"dense": {"loss": 1.23456, "tokens": 12_345}, "PEER, every block": {"loss": None, "usage": [0.5, 1.0]}}
MANY = {f"method {n}": {f"quantity {m}": 1000 * n + m for m in range(9)} for n in range(12)}


def test_a_column_for_each_subject_where_there_is_room() -> None:
    header, *_ = (line for line in shown(FEW).splitlines() if "dense" in line)
    assert "PEER, every block" in header
    assert "1.235" in shown(FEW)
    assert "0.5, 1" in shown(FEW)


def test_a_row_for_each_subject_on_request_or_where_columns_are_too_wide() -> None:
    wide = {f"a rather long name of method {n}": {"loss": float(n)} for n in range(6)}
    for text in (shown(FEW, rows=True), shown(wide)):
        (header,) = (line for line in text.splitlines() if "loss" in line)
        assert "dense" not in header
        assert "long name" not in header


def test_a_block_for_each_subject_where_neither_fits() -> None:
    lines = shown(MANY, title="all").splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "all"
    assert [line.strip() for line in lines if line.startswith("method")] == list(MANY)
    assert sum("11,008" in line for line in lines) == 1


@pytest.mark.parametrize("width", [40, 60, 80, 120, 300])
@pytest.mark.parametrize("rows", [False, True])
def test_nothing_is_cut_short_at_any_width(width: int, rows: bool) -> None:
    text = shown(MANY, width, rows=rows)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for name, quantities in MANY.items():
        assert name in text
        for value in quantities.values():
            assert f"{value:,}" in text


def test_names_are_no_markup() -> None:
    assert "[bold]x[/bold]" in shown({"[bold]x[/bold]": {"[red]": "[/red]"}})


def test_a_block_leaves_out_what_is_empty_and_shows_what_is_infinite() -> None:
    text = shown({name: {"empty": "", "infinite": None, **values} for name, values in MANY.items()})
    assert "empty" not in text
    assert text.count("infinite") == len(MANY)


def test_markdown_of_tables_and_paragraphs() -> None:
    table = "| FLOPs | method | loss |\n|---|---|---|\n| 1e9 | a \\| b | 2.5 |\n| 1e9 | dense | 3.5 |\n"
    screen = io.StringIO()
    print_markdown(f"First **things**\nof `two` lines.\n\n{table}\nThe end.", Console(file=screen, width=80))
    text = screen.getvalue()
    assert "First things of two lines." in text
    assert "1e9, a | b" in text
    assert "1e9, dense" in text
    assert text.rstrip().endswith("The end.")
