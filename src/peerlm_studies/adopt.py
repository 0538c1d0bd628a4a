"""Rows that were made with the text in another place become those of a recipe as it is now.

python -m peerlm_studies.adopt runs/elsewhere/rows.jsonl recipes/frontier.toml results/frontier.jsonl
python -m peerlm_studies.adopt runs/elsewhere/rows.jsonl recipes/seconds.toml results/seconds.jsonl
    --speeds runs/elsewhere/speeds.jsonl --speeds-output results/seconds_speeds.jsonl
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from peerlm.errors import UserError
from peerlm.train.config import TrainConfig
from peerlm.train.recipe import from_dict, to_dict
from peerlm_studies.comparison.plan import CompareConfig, PlannedRun
from peerlm_studies.equal_seconds.plan import load_seconds, runs_at_speeds, speed_key
from peerlm_studies.isoflop.plan import runs_of_recipe
from peerlm_studies.rows import append_row, read_rows, read_runs
from peerlm_studies.script import run_script


def adopt(
    rows: Path, recipe: Path, output: Path, settings: Sequence[str] = (), speeds: Path | None = None
) -> tuple[int, list[str]]:
    """Append to `output` the rows of a recipe's runs, found by all settings but where their text and folder are.

    A row gets the key, label, swept values and configuration that the recipe gives its run: its figures stay. That the
    text is the same is for the caller to know. Rows that `output` has are left out. A recipe of equal seconds needs the
    file of `speeds` that its runs were made at, as `adopt_speeds` writes it.

    Returns:
        How many rows were appended, and the labels of those that belong to no run of the recipe, or whose models were
        evaluated on other files or on other parts of them.

    Raises:
        UserError: a file or a recipe cannot be read.
    """
    if not rows.is_file():
        raise UserError(f"there are no rows at {rows}: name a file that peerlm compare or peerlm isoflop wrote")
    if speeds is None:
        compare, runs = runs_of_recipe(recipe, settings)
    else:
        compare, runs = runs_at_speeds(recipe, read_rows(speeds), list(settings))
    planned = {_key(run, compare): run for run in runs}
    have = {row["key"] for row in read_rows(output)}
    appended, strangers = 0, []
    for row in read_runs(rows):
        train = from_dict(TrainConfig, row["config"])
        run = planned.get(_key(PlannedRun(method=row["method"], seed=row["seed"], sweep={}, train=train), compare))
        if run is None or not _evaluated_alike(row, compare):
            strangers.append(row["label"])
        elif run.key(compare) not in have:
            names = {"method": run.method, "label": run.label, "sweep": run.sweep}
            append_row(output, {**row, "key": run.key(compare), **names, "config": to_dict(run.train)})
            appended += 1
    return appended, strangers


def _evaluated_alike(row: Mapping[str, Any], compare: CompareConfig) -> bool:
    """Whether a row has the figures that the recipe asks for; older rows do not say how much of a file was read."""
    files = {Path(file).stem for file in compare.evaluate}
    limit = row.get("evaluate_limit", compare.evaluate_limit) if files else compare.evaluate_limit
    return set(row.get("evaluation") or {}) == files and limit == compare.evaluate_limit


def adopt_speeds(speeds: Path, recipe: Path, output: Path, settings: Sequence[str] = ()) -> int:
    """Append to `output` the speeds of a recipe of equal seconds, found as rows are; returns how many.

    Raises:
        UserError: a file or a recipe cannot be read.
    """
    if not speeds.is_file():
        raise UserError(f"there are no speeds at {speeds}: name a file that peerlm seconds --speeds wrote")
    plan = load_seconds(recipe, list(settings))
    have, appended = {row["key"] for row in read_rows(output)}, 0
    for row in read_rows(speeds):
        timed = replace(plan.seconds, passes=len(row.get("passes", [row["seconds_per_step"]])))
        key = speed_key(_anywhere(from_dict(TrainConfig, row["config"])), row["threads"], timed)
        for method in plan.recipe.methods:
            train, own = plan.timed(method), plan.speed_key(method, row["threads"])
            if own not in have and key == speed_key(_anywhere(train), row["threads"], plan.seconds):
                append_row(output, {**row, "key": own, "method": method, "config": to_dict(train)})
                have.add(own)
                appended += 1
    return appended


def _key(run: PlannedRun, compare: CompareConfig) -> str:
    """The key of a run wherever its text is."""
    return replace(run, train=_anywhere(run.train)).key(compare)


def _anywhere(train: TrainConfig) -> TrainConfig:
    """A configuration that does not say where the text is."""
    return replace(train, data=replace(train.data, folder="-", sources=()))


def main(
    rows: Path,
    recipe: Path,
    output: Path,
    settings: Annotated[list[str], typer.Option("--set", help="Change a key of the recipe; repeatable.")] = [],  # noqa: B006
    speeds: Annotated[Path | None, typer.Option(help="Of a recipe of equal seconds: its file of speeds.")] = None,
    speeds_output: Annotated[Path | None, typer.Option(help="Where these are appended.")] = None,
) -> None:
    """Let rows be those of a recipe's runs."""
    if (speeds is None) != (speeds_output is None):
        raise UserError("--speeds and --speeds-output belong together: give both, or neither")
    if speeds is not None and speeds_output is not None:
        typer.echo(f"{adopt_speeds(speeds, recipe, speeds_output, settings)} speeds appended to {speeds_output}")
    appended, strangers = adopt(rows, recipe, output, settings, speeds_output)
    typer.echo(f"{appended} rows appended to {output}")
    if strangers:
        typer.echo(f"of no run of {recipe}, and left out: {', '.join(strangers)}")


if __name__ == "__main__":
    run_script(main)
