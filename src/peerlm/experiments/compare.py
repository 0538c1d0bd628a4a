"""The main job: PEER and its rivals in the same model, on the same data, for the same FLOPs."""

import datetime
import json
import os
import platform
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from peerlm.errors import UserError
from peerlm.evaluate import load_model, sample_text
from peerlm.experiments.figures import plot_losses
from peerlm.experiments.plan import ComparePlan, PlannedRun, load_plan
from peerlm.experiments.processes import Processes
from peerlm.experiments.rows import append_row, read_rows
from peerlm.experiments.tables import markdown_table, print_table, summarise
from peerlm.train.build import prepare_data
from peerlm.train.recipe import to_dict
from peerlm.train.stopped import TrainingStopped


def compare(recipe: str | Path, overrides: Sequence[str] = (), *, progress: bool = True) -> list[dict[str, Any]]:
    """Train and evaluate every run of a comparison's recipe (see `load_plan`), then write its table, plots and sample.

    Each run is a process of its own, so that peak memory is its alone. Finished runs are rows of OUTPUT/rows.jsonl and
    are not made again; an interrupted one goes on from its checkpoint. OUTPUT also gets table.md, table.json, loss.png
    and sample.txt.

    Args:
        recipe: TOML file.
        overrides: `section.key=value`, as for `peerlm train`.
        progress: whether to show progress, the table and the sample.

    Returns:
        One row per method and swept setting, over seeds, as in table.json.

    Raises:
        UserError: a mistake in the recipe or its data.
        TrainingStopped: a run was stopped or its loss was not finite; it carries that run's exit code.
    """
    plan = load_plan(recipe, overrides)
    console = Console(quiet=not progress)
    rows_path = plan.output / "rows.jsonl"
    for file in plan.compare.evaluate:
        if not Path(file).is_file():
            raise UserError(f"compare.evaluate names {file}, which does not exist: correct the path or leave it out")
    for data in {run.train.data.folder: run.train.data for run in plan.runs}.values():
        prepare_data(data, progress=progress)
    done = {row["key"] for row in read_rows(rows_path)}
    missing = [run for run in plan.runs if run.key(plan.compare) not in done]
    console.print(
        f"{len(plan.runs)} runs, {len(plan.runs) - len(missing)} done before", highlight=False, soft_wrap=True
    )
    jobs = plan.compare.jobs
    with ThreadPoolExecutor(jobs) as pool, Processes(jobs=jobs, shown=progress) as processes:
        coming = [pool.submit(_make_row, run, plan, processes, console) for run in missing]
        try:
            for row in as_completed(coming):
                append_row(rows_path, row.result())
        finally:
            for row in coming:
                row.cancel()
    wanted = {run.key(plan.compare) for run in plan.runs}
    rows = [row for row in read_rows(rows_path) if row["key"] in wanted]
    table = summarise(rows)
    command = f"peerlm compare {' '.join([str(recipe), *(f'--set {setting}' for setting in overrides)])}"
    (plan.output / "table.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    (plan.output / "table.md").write_text(markdown_table(table, command=command, rows=rows), encoding="utf-8")
    plot_losses(rows, plan.output / "loss.png")
    sample = _write_sample(plan)
    print_table(table, console)
    if sample:
        console.print(f"{plan.compare.sample} writes: {sample}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"Table, plot, rows and sample are in {plan.output}.", highlight=False, soft_wrap=True)
    return table


def _make_row(run: PlannedRun, plan: ComparePlan, processes: Processes, console: Console) -> dict[str, Any]:
    """Train and evaluate one run, in processes of their own."""
    folder = Path(run.train.run)
    console.print(f"{run.label}, seed {run.seed}", markup=False, highlight=False, soft_wrap=True)
    config = plan.output / "recipes" / f"{folder.name}.json"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(json.dumps(to_dict(run.train), indent=2) + "\n", encoding="utf-8")
    _peerlm(run, processes, "train", str(config), *(["--resume"] if folder.exists() else []))
    evaluation = {}
    if files := plan.compare.evaluate:
        results = folder / "evaluation.json"
        limit = [] if plan.compare.evaluate_limit is None else ["--limit", str(plan.compare.evaluate_limit)]
        _peerlm(run, processes, "eval", str(folder), *files, "--json", str(results), *limit)
        evaluation = {Path(file).stem: row for file, row in json.loads(results.read_text(encoding="utf-8")).items()}
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    console.print(
        f"{run.label}, seed {run.seed}: perplexity {summary['perplexity']:.2f} after {summary['seconds']:,.0f} s",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return {
        "key": run.key(plan.compare),
        "method": run.method,
        "label": run.label,
        "seed": run.seed,
        "sweep": run.sweep,
        "config": to_dict(run.train),
        "summary": summary,
        "evaluation": evaluation,
        "curve": [
            {name: row[name] for name in ("tokens", "flops", "seconds", "validation_loss")}
            for row in read_rows(folder / "log.jsonl")
            if "validation_loss" in row
        ],
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def _peerlm(run: PlannedRun, processes: Processes, *arguments: str) -> None:
    exit_code, reason = processes.peerlm(*arguments)
    if exit_code:
        raise TrainingStopped(
            f"peerlm {arguments[0]} of {run.label}, seed {run.seed}, ended with exit code {exit_code}"
            f"{': ' if reason else ''}{reason}; once that is mended the same command goes on",
            exit_code=exit_code if exit_code > 0 else 128 - exit_code,
        )


def _write_sample(plan: ComparePlan) -> str:
    chosen = next((run for run in plan.runs if run.method == plan.compare.sample), None)
    if chosen is None:
        return ""
    model, tokenizer = load_model(chosen.train.run)
    text = sample_text(
        model, tokenizer, plan.compare.prompt, tokens=plan.compare.sample_tokens, temperature=0.8, seed=0
    )
    (plan.output / "sample.txt").write_text(text + "\n", encoding="utf-8")
    return text
