"""Rows survive kills: whole lines stay, a line cut short is made again."""

from pathlib import Path

import pytest

from peerlm import UserError
from peerlm_studies.rows import append_row, read_rows, read_runs


def test_rows_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    assert read_rows(path) == []
    append_row(path, {"a": 1})
    append_row(path, {"a": [2, None]})
    assert read_rows(path) == [{"a": 1}, {"a": [2, None]}]


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_line_cut_short_is_left_out_and_then_replaced(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "rows.jsonl"
    append_row(path, {"a": 1})
    append_row(path, {"b": 2})
    path.write_bytes(path.read_bytes()[:-cut])
    kept = [{"a": 1}, {"b": 2}] if cut == 1 else [{"a": 1}]
    assert read_rows(path) == kept
    append_row(path, {"c": 3})
    assert read_rows(path) == [*kept, {"c": 3}]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"b"\n{"c": 3}\n')
    with pytest.raises(UserError, match=r"rows.jsonl, line 2, is not a row of JSON: .*; delete the line"):
        read_rows(path)


@pytest.mark.parametrize("content", ["3", '{"key": "a", "method": "dense"}'])
def test_rows_of_no_training_run_are_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{content}\n")
    with pytest.raises(UserError, match=r"rows.jsonl, row 1, is of no training run: name a file that peerlm compare"):
        read_runs(path)
