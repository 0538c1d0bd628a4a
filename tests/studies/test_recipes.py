"""Recipes and tasks run for anyone: they name no text outside of this repository, and old rows are still theirs."""

import json
import re
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml

from peerlm.train.recipe import read_recipe
from peerlm_studies.comparison.make_rows import rows_of
from peerlm_studies.equal_seconds.plan import runs_at_speeds
from peerlm_studies.isoflop.plan import runs_of_recipe
from peerlm_studies.lifelong.plan import load_plan as load_streams
from peerlm_studies.report.plan import SectionConfig, load_report
from peerlm_studies.rows import read_rows

ROOT = Path(__file__).parents[2]
RECIPES = sorted(ROOT.glob("recipes/**/*.toml"))
TASKS = sorted(ROOT.glob("recipes/tasks/*.yaml"))
REPORT = load_report(ROOT / "results/report.toml")
OF_A_RECIPE = [section for section in REPORT.section if section.recipe]


@pytest.mark.parametrize("path", [*RECIPES, *TASKS], ids=lambda path: path.name)
def test_nothing_outside_of_the_repository_is_named(path: Path) -> None:
    assert not re.findall(r"(?<!\w)(?:\.\./|~/|/home/|/work/|/mnt/)\S*", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_text_is_the_embedded_corpus_or_the_head_says_what_it_is(path: Path) -> None:
    values = read_recipe(path)
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    sources = values["data"].get("sources", [])
    assert sources == ["demo"] or "# Text: " in head or sources[0].startswith("hf:")
    assert values.get("compare", {}).get("evaluate", []) == []


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.name)
def test_the_head_of_a_task_names_its_data_and_how_to_give_them(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    loader: Any = type("Loader", (yaml.SafeLoader,), {})
    loader.add_multi_constructor("!", lambda *ignored: None)
    files = yaml.load(text, Loader=loader)["dataset_kwargs"]["data_files"]
    head = "".join(line for line in text.splitlines() if line.startswith("#"))
    assert files in head
    assert "--task-data" in head


@pytest.mark.parametrize("name", ["arc_easy", "piqa", "boolq"])
def test_questions_are_asked_as_published_figures_ask_them(name: str) -> None:
    task = yaml.safe_load((ROOT / f"recipes/tasks/{name}.yaml").read_text(encoding="utf-8"))
    asked = jinja2.Template(task["doc_to_text"]).render(query="Question: dresser\n")
    assert asked == "Question: dresser\nAnswer:"  # as lm-eval's own tasks: the choice follows after a space


@pytest.mark.parametrize("section", OF_A_RECIPE, ids=lambda section: section.title)
def test_every_row_of_a_report_is_still_a_run_of_its_recipe(section: SectionConfig) -> None:
    settings = [*REPORT.settings, *section.settings]
    if section.kind == "seconds":
        compare, runs = runs_at_speeds(ROOT / section.recipe, read_rows(ROOT / section.speeds), settings)
    else:
        compare, runs = runs_of_recipe(ROOT / section.recipe, settings)
    rows = [row for file in section.rows for row in read_rows(ROOT / file)]
    assert rows
    assert rows_of(runs, compare, rows) == rows


def test_rows_of_lifelong_learning_are_still_those_of_its_recipe() -> None:
    """Their keys have the paths of the text, which were others: those in the rows' configurations of that time."""
    shared = "/".join(("..", "shared", "data"))
    settings = []
    for name in ("prose", "encyclopedia", "code", "techdocs"):
        settings.append(f'lifelong.domains.{name}.text=["{shared}/domains/{name}.txt.xz"]')
        settings.append(f'lifelong.domains.{name}.heldout="{shared}/eval/{name}_heldout.txt"')
    plan = load_streams(ROOT / "recipes/lifelong.toml", settings)
    wanted = {stream.key(number) for stream in plan.streams for number in range(len(stream.order) + 1)}
    have = {json.loads(line)["key"] for line in (ROOT / "results/lifelong.jsonl").read_text().splitlines()}
    assert len(wanted) == 120
    assert wanted <= have
