"""Planned training runs become rows: each is trained and evaluated in processes of its own, unless its row is there."""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from shutil import rmtree
from typing import Any

from rich.console import Console

from peerlm.errors import TrainingStopped, UserError
from peerlm.files import write_json
from peerlm.ranks import ALONE, Ranks
from peerlm.train.build import prepare_data
from peerlm.train.recipe import load_recipe, to_dict
from peerlm_studies.comparison.plan import CompareConfig, PlannedRun
from peerlm_studies.processes import Processes
from peerlm_studies.rows import append_row, machine_and_date, read_rows
from peerlm_studies.shards import Shard, read_study, rows_file

CURVE = ("tokens", "flops", "seconds", "validation_loss")
"""What a row keeps of each evaluation in training; where a run measures copying, that too."""


def make_rows(
    runs: Sequence[PlannedRun],
    compare: CompareConfig,
    output: Path,
    console: Console,
    *,
    shown: bool,
    shard: Shard | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Train and evaluate every run that OUTPUT's rows lack, `compare.jobs` at a time, and append its row.

    Args:
        runs: in the order in which they are made.
        compare: what is evaluated.
        output: the comparison's folder.
        console: for a line about each run.
        shown: whether the progress of runs is shown too.
        shard: of the runs only this share, to a file of its own; see `peerlm_studies.shards`.
        ranks: those that train each run together; this is the first one, and the others are in `over_ranks`.

    Raises:
        UserError: a file to evaluate does not exist, the data cannot be prepared, or a run without a row is done and
            was measured with other settings of [eval].
        TrainingStopped: a run was stopped or its loss was not finite; it carries that run's exit code.
    """
    rows_path = rows_file(output, shard)
    if shard is not None:
        runs = shard.share(runs, lambda run: run.key(compare))
    for file in compare.evaluate:
        if not Path(file).is_file():
            raise UserError(f"compare.evaluate names {file}, which does not exist: correct the path or leave it out")
    prepare_texts(runs, shown=shown)
    done = {row["key"] for row in read_study(output)}
    missing = [run for run in runs if run.key(compare) not in done]
    for run in missing:
        _check_measured_alike(run)
    console.print(f"{len(runs)} runs, {len(runs) - len(missing)} done before", highlight=False, soft_wrap=True)
    with ThreadPoolExecutor(compare.jobs) as pool, Processes(jobs=compare.jobs, shown=shown, ranks=ranks) as processes:
        coming = {pool.submit(_make_row, run, compare, output, processes, console): run for run in missing}
        try:
            for row in as_completed(coming):
                append_row(rows_path, row.result())
                _free_disk(coming[row], compare)
        finally:
            for row in coming:
                row.cancel()


def prepare_texts(runs: Sequence[PlannedRun], *, shown: bool) -> None:
    """Prepare what the runs read, each folder once; raises UserError where that cannot be done."""
    for data in {run.train.data.folder: run.train.data for run in runs}.values():
        prepare_data(data, progress=shown)


def _check_measured_alike(run: PlannedRun) -> None:
    """A run that is done is not measured again: its figures would be filed under settings that it did not have."""
    folder = Path(run.train.run)
    if not (folder / "summary.json").is_file():
        return
    before, now = (to_dict(each)["eval"] for each in (load_recipe(folder / "config.json"), run.train))
    for name, value in now.items():
        if before[name] != value:
            raise UserError(
                f"{folder} is done and was measured with eval.{name} = {before[name]!r}, not {value!r}: delete that "
                "folder to train it again, or name another for the study with --set run=..."
            )


def _free_disk(run: PlannedRun, compare: CompareConfig) -> None:
    """Delete what `compare.keep` does not ask for of a run that has its row."""
    folder = Path(run.train.run)
    if compare.keep != "checkpoints":
        rmtree(folder / "checkpoints", ignore_errors=True)
    if compare.keep == "rows" and run.method != compare.sample:
        rmtree(folder / "model", ignore_errors=True)


def lacks_rows(runs: Sequence[PlannedRun], compare: CompareConfig, output: Path) -> int:
    """How many of the runs have no row in OUTPUT."""
    return len({run.key(compare) for run in runs} - {row["key"] for row in read_study(output)})


def rows_of(
    runs: Sequence[PlannedRun], compare: CompareConfig, rows: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Those of the rows, in their order, that belong to the runs."""
    wanted = {run.key(compare) for run in runs}
    return [row for row in rows if row["key"] in wanted]


def _make_row(
    run: PlannedRun, compare: CompareConfig, output: Path, processes: Processes, console: Console
) -> dict[str, Any]:
    """Train and evaluate one run, in processes of their own."""
    folder = Path(run.train.run)
    console.print(f"{run.label}, seed {run.seed}", markup=False, highlight=False, soft_wrap=True)
    config = output / "recipes" / f"{folder.name}.json"
    config.parent.mkdir(parents=True, exist_ok=True)
    write_json(config, to_dict(run.train))
    _run(run, processes.on_all_ranks, "train", str(config), "--resume=auto")
    evaluation = {}
    if files := compare.evaluate:
        results = folder / "evaluation.json"
        limit = [] if compare.evaluate_limit is None else ["--limit", str(compare.evaluate_limit)]
        _run(run, processes.peerlm, "eval", str(folder), *files, "--json", str(results), *limit)
        evaluation = {Path(file).stem: row for file, row in json.loads(results.read_text(encoding="utf-8")).items()}
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    console.print(
        f"{run.label}, seed {run.seed}: perplexity {summary['perplexity']:.2f} after {summary['seconds']:,.0f} s",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return {
        "key": run.key(compare),
        "method": run.method,
        "label": run.label,
        "seed": run.seed,
        "sweep": run.sweep,
        "config": to_dict(run.train),
        "summary": summary,
        "evaluation": evaluation,
        "evaluate_limit": compare.evaluate_limit,
        "curve": [
            {name: row[name] for name in (*CURVE, "copying") if name in row}
            for row in read_rows(folder / "log.jsonl")
            if "validation_loss" in row
        ],
        **machine_and_date(),
    }


def _run(run: PlannedRun, peerlm: Callable[..., tuple[int, str]], *arguments: str) -> None:
    exit_code, reason = peerlm(*arguments)
    if exit_code:
        raise TrainingStopped(
            f"peerlm {arguments[0]} of {run.label}, seed {run.seed}, ended with exit code {exit_code}"
            f"{': ' if reason else ''}{reason}; fix that, and run the same command again",
            exit_code=exit_code if exit_code > 0 else 128 - exit_code,
        )
