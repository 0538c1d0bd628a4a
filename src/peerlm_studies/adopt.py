"""Rows that were made with the text in another place become those of a recipe as it is now.

python -m peerlm_studies.adopt runs/elsewhere/rows.jsonl recipes/frontier.toml results/frontier.jsonl
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from peerlm.errors import UserError
from peerlm.train.config import TrainConfig
from peerlm.train.recipe import from_dict, to_dict
from peerlm_studies.comparison.plan import CompareConfig, PlannedRun
from peerlm_studies.isoflop.plan import runs_of_recipe
from peerlm_studies.rows import append_row, read_rows, read_runs
from peerlm_studies.script import run_script


def adopt(rows: Path, recipe: Path, output: Path, settings: Sequence[str] = ()) -> tuple[int, list[str]]:
    """Append to `output` the rows of a recipe's runs, found by all settings but where their text and folder are.

    A row gets the key, label, swept values and configuration that the recipe gives its run: its figures stay. That the
    text is the same is for the caller to know. Rows that `output` has are left out.

    Returns:
        How many rows were appended, and the labels of those that belong to no run of the recipe.

    Raises:
        UserError: a file or a recipe cannot be read.
    """
    if not rows.is_file():
        raise UserError(f"there are no rows at {rows}: name a file that peerlm compare or peerlm isoflop wrote")
    compare, runs = runs_of_recipe(recipe, settings)
    planned = {_key(run, compare): run for run in runs}
    have = {row["key"] for row in read_rows(output)}
    appended, strangers = 0, []
    for row in read_runs(rows):
        train = from_dict(TrainConfig, row["config"])
        run = planned.get(_key(PlannedRun(method=row["method"], seed=row["seed"], sweep={}, train=train), compare))
        if run is None:
            strangers.append(row["label"])
        elif run.key(compare) not in have:
            names = {"method": run.method, "label": run.label, "sweep": run.sweep}
            append_row(output, {**row, "key": run.key(compare), **names, "config": to_dict(run.train)})
            appended += 1
    return appended, strangers


def _key(run: PlannedRun, compare: CompareConfig) -> str:
    """The key of a run wherever its text is."""
    data = replace(run.train.data, folder="-", sources=())
    return replace(run, train=replace(run.train, data=data)).key(compare)


def main(
    rows: Path,
    recipe: Path,
    output: Path,
    settings: Annotated[list[str], typer.Option("--set", help="Change a key of the recipe; repeatable.")] = [],  # noqa: B006
) -> None:
    """Let rows be those of a recipe's runs."""
    appended, strangers = adopt(rows, recipe, output, settings)
    typer.echo(f"{appended} rows appended to {output}")
    if strangers:
        typer.echo(f"of no run of {recipe}, and left out: {', '.join(strangers)}")


if __name__ == "__main__":
    run_script(main)
