"""IsoFLOP curves: every method at several sizes for the same FLOPs, and each one's best size."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from peerlm.errors import UserError
from peerlm.files import write_bytes, write_json
from peerlm.ranks import ALONE, Ranks
from peerlm.terminal import print_markdown
from peerlm_studies.comparison.make_rows import lacks_rows, make_rows, rows_of
from peerlm_studies.comparison.plan import PlannedRun
from peerlm_studies.comparison.tables import show_table, summarise
from peerlm_studies.figures import save_plot
from peerlm_studies.frontier.study import frontier_of_study
from peerlm_studies.isoflop.curves import Curve, curves_of, equal_seconds_table, optima_table, rows_of_curves
from peerlm_studies.isoflop.figures import plot_costs, plot_curves
from peerlm_studies.isoflop.plan import IsoflopPlan, load_isoflop
from peerlm_studies.isoflop.seconds import Cost, comparable_seconds
from peerlm_studies.isoflop.tables import equal_seconds_markdown, optima_markdown
from peerlm_studies.shards import Shard, read_study, say_incomplete


def isoflop(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    methods: Sequence[str] = (),
    budgets: Sequence[str] = (),
    sizes: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    progress: bool = True,
    shard: Shard | None = None,
    ranks: Ranks = ALONE,
) -> list[dict[str, Any]]:
    """Train and evaluate the runs of an isoFLOP recipe (see `load_isoflop`), then write its tables and plots.

    Finished runs are rows of OUTPUT/rows.jsonl, as a comparison's, and are not made again. When every size has a row,
    the one nearest to each optimum is trained with isoflop.optimum_seeds. OUTPUT also gets isoflop.json (both tables),
    isoflop.md, curves.png, costs.png, and what loss costs in bytes, seconds and memory (`frontier.study.frontier`).

    Args:
        recipe: TOML file.
        overrides: `section.key=value`, as for `peerlm train`.
        methods, budgets, sizes: only these names; empty: all.
        seeds: in place of compare.seeds. With these, or with only a part, no seeds are added at the optimum, and rows
            are all that is written.
        progress: whether to show progress and the tables.
        shard: make only this share of the rows; as of a part, rows are all that is written where others' are missing.
        ranks: those that train each run together, as `peerlm_studies.processes.over_ranks` gives them.

    Returns:
        One row per method and budget, as `optima_table` makes them; of a part, one per run, as `compare` returns them.

    Raises:
        UserError: a mistake in the recipe or its data, or a name that the recipe lacks.
        TrainingStopped: a run was stopped or its loss was not finite; it carries that run's exit code.
    """
    plan = load_isoflop(recipe, overrides)
    console = Console(quiet=not progress)
    part = [run.planned for run in plan.runs(seeds, methods=methods, budgets=budgets, sizes=sizes)]
    if not part:
        raise UserError(f"no run of {recipe} has that budget and that size: see its [isoflop.budgets]")
    make_rows(part, plan.compare, plan.output, console, shown=progress, shard=shard, ranks=ranks)
    lacking = lacks_rows(part, plan.compare, plan.output) if shard is not None else 0
    if not (lacking or methods or budgets or sizes or seeds is not None):
        part = _at_optima(plan)
        make_rows(part, plan.compare, plan.output, console, shown=progress, shard=shard, ranks=ranks)
        lacking = lacks_rows(part, plan.compare, plan.output) if shard is not None else 0
    if lacking or methods or budgets or sizes or seeds is not None:
        table = summarise(rows_of(part, plan.compare, read_study(plan.output)))
        show_table(table, console)
        if lacking:
            say_incomplete(lacking, plan.output, console)
        return table
    curves = curves_of(plan, read_study(plan.output))
    seconds = comparable_seconds(rows_of_curves(curves))
    table, equal_seconds = optima_table(curves, seconds), equal_seconds_table(curves, seconds)
    write_study(plan.output, curves, seconds, table, equal_seconds)
    if progress:
        print_markdown(f"{optima_markdown(table)}\n{equal_seconds_markdown(equal_seconds)}")
    console.print(f"Tables, plots and rows are in {plan.output}.", highlight=False, soft_wrap=True)
    return table


def _at_optima(plan: IsoflopPlan) -> list[PlannedRun]:
    """The runs of isoflop.optimum_seeds at the size nearest to each optimum."""
    curves = curves_of(plan, read_study(plan.output))
    nearest = {(curve.method, curve.flops): curve.nearest.size for curve in curves}
    runs = plan.runs(plan.isoflop.optimum_seeds)
    return [run.planned for run in runs if nearest[run.method, run.flops] == run.size]


def write_study(
    folder: Path,
    curves: Sequence[Curve],
    seconds: Cost,
    table: Sequence[dict[str, Any]],
    equal_seconds: dict[str, Any],
) -> None:
    """Write the tables and plots of a study into its folder."""
    tables = {"optima": table, "equal_seconds": equal_seconds}
    write_json(folder / "isoflop.json", tables)
    text = f"{optima_markdown(table)}\n{equal_seconds_markdown(equal_seconds)}"
    write_bytes(folder / "isoflop.md", text.encode())
    save_plot(plot_curves(curves), folder / "curves.png")
    save_plot(plot_costs(curves, seconds), folder / "costs.png")
    frontier_of_study(rows_of_curves(curves), folder)
