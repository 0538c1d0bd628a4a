"""Rows from elsewhere become a recipe's own, and figures stay."""

import json
from pathlib import Path
from typing import Any

import pytest

from peerlm import UserError
from peerlm.train.recipe import to_dict
from peerlm_studies.adopt import adopt
from peerlm_studies.comparison.make_rows import rows_of
from peerlm_studies.comparison.plan import load_plan
from peerlm_studies.isoflop.plan import runs_of_recipe
from peerlm_studies.rows import read_rows


@pytest.fixture
def elsewhere(study: Any) -> Path:
    """Rows of a comparison that gives two of the study's runs, and one that is none, with the text elsewhere."""
    folder: Path = study.path.parent
    text = study.path.read_text()
    start, end = text.index("[isoflop]"), text.index("[methods.dense")
    budget = "[budget]\nflops = 4e9\n"
    path = folder / "compare.toml"
    path.write_text(text[:start].replace(f"{folder}/tokens", "elsewhere") + budget + text[end:])
    rows = []
    for size, seed in ((16, 0), (64, 0), (24, 0)):
        plan = load_plan(path, [f"model.hidden_size={size}"])
        run = plan.runs[1]
        rows.append(
            {"key": run.key(plan.compare), "method": "another", "label": f"of {size}", "seed": seed, "sweep": {}}
            | {"config": to_dict(run.train), "summary": {"validation_loss": float(size)}, "evaluation": {"other": {}}}
        )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def test_rows_are_those_of_the_recipe_afterwards(study: Any, elsewhere: Path, tmp_path: Path) -> None:
    output = tmp_path / "results" / "rows.jsonl"
    assert adopt(elsewhere, study.path, output) == (2, ["of 24"])
    compare, runs = runs_of_recipe(study.path)
    rows = read_rows(output)
    assert rows_of(runs, compare, rows) == rows
    assert [row["label"] for row in rows] == ["PEER flops=4e9 size=small", "PEER flops=4e9 size=large"]
    assert [row["summary"]["validation_loss"] for row in rows] == [16.0, 64.0]
    assert "elsewhere" not in output.read_text()
    assert adopt(elsewhere, study.path, output) == (0, ["of 24"])


def test_rows_that_are_not_there_are_named(study: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there are no rows at"):
        adopt(tmp_path / "none.jsonl", study.path, tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("evaluation", "limit", "adopted"),
    [(["two"], 5, True), (["one"], 5, False), ([], 5, False), (["two"], None, False), (["two"], "older", True)],
)
def test_rows_that_were_evaluated_otherwise_belong_to_no_run(
    study: Any, elsewhere: Path, tmp_path: Path, evaluation: list[str], limit: Any, adopted: bool
) -> None:
    settings = ['compare.evaluate=["some/two.txt"]', "compare.evaluate_limit=5"]
    rows = [{**row, "evaluation": {name: {} for name in evaluation}} for row in read_rows(elsewhere)]
    if limit != "older":  # rows of older versions do not say
        rows = [{**row, "evaluate_limit": limit} for row in rows]
    elsewhere.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = (2, ["of 24"]) if adopted else (0, ["of 16", "of 64", "of 24"])
    assert adopt(elsewhere, study.path, tmp_path / "rows.jsonl", settings) == expected
