"""A comparison: PEER and its baselines in the same model, on the same data, for the same FLOPs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from peerlm.evaluate import load_model, sample_text
from peerlm.files import write_bytes, write_json
from peerlm.ranks import ALONE, Ranks
from peerlm_studies.comparison.figures import plot_copying, plot_losses
from peerlm_studies.comparison.make_rows import lacks_rows, make_rows, rows_of
from peerlm_studies.comparison.plan import ComparePlan, load_plan
from peerlm_studies.comparison.tables import markdown_table, show_table, summarise
from peerlm_studies.figures import save_plot
from peerlm_studies.frontier.study import frontier_of_study
from peerlm_studies.shards import Shard, read_study, say_incomplete


def compare(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    progress: bool = True,
    shard: Shard | None = None,
    ranks: Ranks = ALONE,
) -> list[dict[str, Any]]:
    """Train and evaluate every run of a comparison's recipe (see `load_plan`), then write its table, plots and sample.

    Each run is a process of its own, so that peak memory is its alone. Finished runs are rows of OUTPUT/rows.jsonl and
    are not made again; an interrupted one resumes from its checkpoint. OUTPUT also gets table.md, table.json, loss.png,
    sample.txt, where runs measure copying copying.png, and of several settings what loss costs in bytes, seconds and
    memory (`frontier.study.frontier`).

    Args:
        recipe: TOML file.
        overrides: `section.key=value`, as for `peerlm train`.
        progress: whether to show progress, the table and the sample.
        shard: make only this share of the rows. Where others' are not there, rows are all that is written.
        ranks: those that train each run together, as `peerlm_studies.processes.over_ranks` gives them.

    Returns:
        One row per method and swept setting, over seeds, as in table.json; of a shard, over the rows that are there.

    Raises:
        UserError: a mistake in the recipe or its data.
        TrainingStopped: a run was stopped or its loss was not finite; it carries that run's exit code.
    """
    plan = load_plan(recipe, overrides)
    console = Console(quiet=not progress)
    make_rows(plan.runs, plan.compare, plan.output, console, shown=progress, shard=shard, ranks=ranks)
    rows = rows_of(plan.runs, plan.compare, read_study(plan.output))
    table = summarise(rows)
    if shard is not None and (lacking := lacks_rows(plan.runs, plan.compare, plan.output)):
        show_table(table, console)
        say_incomplete(lacking, plan.output, console)
        return table
    command = f"peerlm compare {' '.join([str(recipe), *(f'--set {setting}' for setting in overrides)])}"
    write_json(plan.output / "table.json", table)
    write_bytes(plan.output / "table.md", markdown_table(table, command=command, rows=rows).encode())
    plot_losses(rows, plan.output / "loss.png")
    if (copying := plot_copying(rows)) is not None:
        save_plot(copying, plan.output / "copying.png")
    drawn = frontier_of_study(rows, plan.output) or copying is not None
    sample = _write_sample(plan)
    show_table(table, console)
    if sample:
        console.print(f"{plan.compare.sample} writes: {sample}", markup=False, highlight=False, soft_wrap=True)
    what = ["Table", "plots" if drawn else "plot", "rows", *(["sample"] if sample else [])]
    console.print(f"{', '.join(what[:-1])} and {what[-1]} are in {plan.output}.", highlight=False, soft_wrap=True)
    return table


def _write_sample(plan: ComparePlan) -> str:
    own = (run for run in plan.runs if run.method == plan.compare.sample)
    chosen = next((run for run in own if (Path(run.train.run) / "model").is_dir()), None)
    if chosen is None:  # no such method, or rows without models, as they come from another machine
        return ""
    model, tokenizer = load_model(chosen.train.run)
    text = sample_text(
        model, tokenizer, plan.compare.prompt, tokens=plan.compare.sample_tokens, temperature=0.8, seed=0
    )
    write_bytes(plan.output / "sample.txt", f"{text}\n".encode())
    return text
