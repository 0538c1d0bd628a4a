"""Losses at equal seconds: speeds are measured once, then runs are made of as many steps as fit."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from peerlm.files import write_bytes, write_json
from peerlm.terminal import print_markdown
from peerlm.train.build import prepare_data
from peerlm.train.disturbance import disturbed
from peerlm.train.recipe import to_dict
from peerlm_studies.comparison.make_rows import make_rows
from peerlm_studies.equal_seconds.plan import SecondsPlan, load_seconds
from peerlm_studies.equal_seconds.plot import plot_seconds
from peerlm_studies.equal_seconds.speed import measure_speed
from peerlm_studies.equal_seconds.tables import seconds_markdown, seconds_table
from peerlm_studies.figures import save_plot
from peerlm_studies.rows import append_row, read_rows
from peerlm_studies.shards import read_study

SPEEDS_FILE = "speeds.jsonl"
"""Where in the study's folder its speeds are; while a row is there it is not measured again."""
PASSES_FILE = "passes.jsonl"
"""Where single passes are until all of a method are there."""


def equal_seconds(recipe: str | Path, overrides: Sequence[str] = (), *, progress: bool = True) -> list[dict[str, Any]]:
    """Train the methods of a recipe of equal seconds (see `load_seconds`), then write the table and the plot.

    First each method's seconds per step are measured, with nothing else running if they are to be worth something, and
    kept as rows of OUTPUT/speeds.jsonl. A point in seconds is then a number of steps. So a run has the schedule of its
    point, resumes to the same bits, and its loss does not depend on what else the machine does while it is trained.
    Runs are rows of OUTPUT/rows.jsonl, as a comparison's. OUTPUT also gets seconds.json, seconds.md and seconds.png.

    Returns:
        A row per method and point, as `seconds_table` makes them.

    Raises:
        UserError: a mistake in the recipe or its data.
        TrainingStopped: a run was stopped or its loss was not finite; it carries that run's exit code.
    """
    plan = load_seconds(recipe, list(overrides))
    console = Console(quiet=not progress)
    speeds = measure_speeds(plan, console, progress=progress)
    runs = plan.runs({method: speed["seconds_per_step"] for method, speed in speeds.items()})
    make_rows([run.planned for run in runs], plan.compare, plan.output, console, shown=progress)
    table = seconds_table(plan, runs, read_study(plan.output), speeds)
    write_json(plan.output / "seconds.json", table)
    write_bytes(plan.output / "seconds.md", seconds_markdown(table).encode())
    save_plot(plot_seconds(table), plan.output / "seconds.png")
    if progress:
        print_markdown(seconds_markdown(table))
    console.print(f"Table, plot, speeds and rows are in {plan.output}.", highlight=False, soft_wrap=True)
    return table


def measure_speeds(plan: SecondsPlan, console: Console, *, progress: bool) -> dict[str, dict[str, Any]]:
    """The rows of speeds by method; those that OUTPUT/speeds.jsonl lacks are measured now, one after the other.

    Of methods whose speed is known to be one, the first is measured.
    Each pass is kept in OUTPUT/passes.jsonl until all of them are done, so that what was stopped resumes.
    """
    path, passes_path = plan.output / SPEEDS_FILE, plan.output / PASSES_FILE
    have = {row["key"]: row for row in read_rows(path)}
    keys = {method: plan.speed_key(method, torch.get_num_threads()) for method in plan.recipe.methods}
    first: dict[str, str] = {}
    for method, key in keys.items():
        first.setdefault(key, method)
    missing = {method: plan.timed(method) for key, method in first.items() if key not in have}
    for data in {train.data.folder: train.data for train in missing.values()}.values():
        prepare_data(data, progress=progress)
    passes = {key: [row for row in read_rows(passes_path) if row["key"] == key] for key in keys.values()}
    for number in range(1, plan.seconds.passes + 1):
        for method, train in missing.items():
            own = passes[key := keys[method]]
            if len(own) < number:
                prepared = replace(train, data=replace(train.data, sources=()))  # what it was made from was said once
                own.append({"key": key, **measure_speed(prepared, warm_up=plan.seconds.warm_up)})
                if plan.seconds.passes > 1:
                    append_row(passes_path, own[-1])
            if number == plan.seconds.passes:
                have[key] = {"key": key, "method": method, **median_pass(own), "config": to_dict(train)}
                append_row(path, have[key])
                console.print(_said(have[key]), markup=False, highlight=False, soft_wrap=True)
        if missing and number < plan.seconds.passes:
            console.print(f"pass {number} of {plan.seconds.passes} is done", highlight=False)
    passes_path.unlink(missing_ok=True)
    return {method: have[key] for method, key in keys.items()}


def median_pass(passes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row of several of `measure_speed`: medians over them, and the seconds of each; a single one as it is."""
    if len(passes) == 1:
        return dict(passes[0])
    seconds = [each["seconds_per_step"] for each in passes]
    middle, quarter = statistics.median(seconds), len(seconds) // 4
    others = [each["other_cores"] for each in passes]
    return {
        **passes[-1],
        "seconds_per_step": middle,
        "spread": (sorted(seconds)[-1 - quarter] - sorted(seconds)[quarter]) / middle,
        "steps": sum(each["steps"] for each in passes),
        "other_cores": None if None in others else statistics.median(others),
        "passes": seconds,
    }


def _said(speed: Mapping[str, Any]) -> str:
    text = f"{speed['method']}: {1e3 * speed['seconds_per_step']:.1f} ms a step"
    if disturbed(speed["other_cores"]):
        text += (
            f"; other programs used {speed['other_cores']:.1f} cores meanwhile: for seconds that compare, delete the "
            f"row from {SPEEDS_FILE} and measure again on a quiet machine"
        )
    return text
