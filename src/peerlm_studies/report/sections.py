"""Sections of a report: rows become a table in Markdown and plots."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from peerlm.errors import UserError
from peerlm.evaluate.likelihood import exp
from peerlm_studies.comparison.figures import plot_copying
from peerlm_studies.comparison.make_rows import rows_of
from peerlm_studies.comparison.tables import columns_of, summarise
from peerlm_studies.equal_seconds.plan import load_seconds
from peerlm_studies.equal_seconds.plot import plot_seconds
from peerlm_studies.equal_seconds.tables import seconds_markdown, seconds_table
from peerlm_studies.figures import add_legend, finish, line_style
from peerlm_studies.frontier.figures import plot_frontier
from peerlm_studies.frontier.points import points_of
from peerlm_studies.frontier.study import COSTS, check_alike
from peerlm_studies.frontier.tables import frontier_markdown
from peerlm_studies.isoflop.curves import curves_of, equal_loss_table, equal_seconds_table, optima_table, rows_of_curves
from peerlm_studies.isoflop.figures import plot_costs, plot_curves
from peerlm_studies.isoflop.plan import load_isoflop, runs_of_recipe
from peerlm_studies.isoflop.seconds import comparable_seconds, seconds_at_speeds
from peerlm_studies.isoflop.tables import equal_loss_markdown, equal_seconds_markdown, optima_markdown
from peerlm_studies.markdown import markdown_rows
from peerlm_studies.report.plan import PlotConfig, SectionConfig
from peerlm_studies.rows import read_rows, read_runs
from peerlm_studies.scaling.law_file import read_law, rows_digest
from peerlm_studies.scaling.laws import law_markdown, plot_law

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Section:
    """What a section shows."""

    rows: list[Row]
    """That it is made from; empty: there is nothing to show yet."""
    tables: list[str] = field(default_factory=list)
    """In Markdown, each a paragraph or a table."""
    figures: dict[str, Figure] = field(default_factory=dict)
    """By what they show."""


def make_section(config: SectionConfig, root: Path = Path(), settings: Sequence[str] = ()) -> Section:
    """Read a section's rows and make its tables and plots.

    Args:
        config: the section.
        root: folder that its paths start at.
        settings: changes to its recipe, before its own.

    Raises:
        UserError: a recipe or a row cannot be read, or a row lacks what is shown of it.
    """
    config = replace(config, settings=(*settings, *config.settings))
    if config.kind == "scaling":
        return _scaling(config, root)
    read = read_rows if config.kind == "table" else read_runs
    rows: list[Row] = [row for file in config.rows for row in read(root / file)]
    if config.kind == "isoflop":
        return _isoflop(config, rows, root)
    if config.kind == "frontier":
        return _frontier(config, rows, root)
    if config.kind == "seconds":
        return _seconds(config, rows, root)
    if config.kind == "comparison":
        return _comparison(config, rows, root)
    return _table(config, rows)


def _scaling(config: SectionConfig, root: Path) -> Section:
    file = root / config.rows[0]
    if not file.is_file():
        return Section(rows=[])
    law = read_law(file)
    files = [root / each for each in law["files"]]
    there = all(each.is_file() for each in files)
    stale = not there or rows_digest(files) != law["digest"]
    tables = [
        *([f"Rows have changed since this was fitted: `{config.command}` fits it again."] if stale else []),
        law_markdown(law),
        f"Constants with the middle 95% of bootstrap draws. `{config.rows[0]}` has all of them, and "
        "predictions use all of them; errors are shares of the loss. Held-out runs, "
        "and each model left out in turn, were predicted by a fit without them.",
    ]
    fitted: list[Row] = [row for each in files if each.is_file() for row in read_rows(each)]
    return Section(rows=fitted or [law], tables=tables, figures={"law": plot_law(law)})


def _isoflop(config: SectionConfig, rows: Sequence[Row], root: Path) -> Section:
    plan = load_isoflop(root / config.recipe, config.settings)
    runs = [run.planned for run in plan.runs(plan.all_seeds)]
    own = rows_of(runs, plan.compare, _once(rows))
    curves = curves_of(plan, own)
    if not curves:
        return Section(rows=[])
    speeds = read_rows(root / config.speeds) if config.speeds else []
    seconds = seconds_at_speeds(plan, speeds) if speeds else comparable_seconds(rows_of_curves(curves))
    table, equal_seconds = optima_table(curves, seconds), equal_seconds_table(curves, seconds)
    made = {row["key"] for row in own}
    missing = [run for run in plan.runs() if run.planned.key(plan.compare) not in made]
    best = min(table, key=lambda row: row["loss"])
    budget = next(name for name in plan.isoflop.budgets if float(name) == best["flops"])
    again = (
        f'peerlm isoflop {config.recipe} --method "{best["method"]}" --budget {budget} --size {best["size"]} '
        f"--seed {best['seeds'][0]} --output runs/again{_same_text(config)}"
    )
    tables = [
        *_not_made(((run.method, f"{run.size} at {run.flops:.3g}") for run in missing), len(plan.runs())),
        optima_markdown(table),
        "The optimum is that of a parabola in the logarithm of active parameters. Loss and perplexity are of the run "
        "nearest to it: means over seeds, with 95% confidence intervals by Student's t. The spread over seeds is "
        f"pooled over all runs of the budget. The best of these runs again, alone: `{again}`.",
        *(
            [
                f"The same rows at equal seconds of training{_at_speeds(config, speeds)}:",
                equal_seconds_markdown(equal_seconds),
            ]
            if equal_seconds["losses"]
            else []
        ),
        "What the lowest loss that all methods reach costs each, read between its best runs:",
        equal_loss_markdown(equal_loss_table(curves, seconds)),
    ]
    return Section(
        rows=own, tables=tables, figures={"curves": plot_curves(curves), "costs": plot_costs(curves, seconds)}
    )


def _same_text(config: SectionConfig) -> str:
    """What a command needs besides to train on the text of the rows, and no other; nothing where it is the recipe's."""
    folders = [each for each in config.settings if each.startswith("data.folder=")]
    return "".join(f" --set {each.replace(chr(34), '')} --set data.sources=[]" for each in folders)


def _at_speeds(config: SectionConfig, speeds: Sequence[Row]) -> str:
    if not speeds:
        return ""
    threads = " or ".join(str(count) for count in sorted({row["threads"] for row in speeds}))
    return f", at the speed of each method and size on {threads} threads of a CPU (`{config.speeds}`)"


def _not_made(runs: Iterable[tuple[str, str]], of: int, count: int | None = None) -> list[str]:
    """A sentence that names the runs of a recipe, `of` in all, without a row, by method; none where each has one.

    count: how many they are, where a name stands for several.
    """
    by_method: dict[str, list[str]] = {}
    for method, place in runs:
        by_method.setdefault(method, []).append(place)
    if not by_method:
        return []
    count = sum(map(len, by_method.values())) if count is None else count
    named = "; ".join(f"{method} ({', '.join(places)})" for method, places in by_method.items())
    return [f"{count} of the recipe's {of} runs were not made, and are not in tables and plots: {named}."]


def _of_recipe(config: SectionConfig, rows: Sequence[Row], root: Path) -> tuple[list[Row], list[str]]:
    """The rows of a recipe's runs, where one is named, and a sentence on runs that were not made."""
    own = _once(rows)
    if not config.recipe:
        return own, []
    compare, runs = runs_of_recipe(root / config.recipe, config.settings)
    own = rows_of(runs, compare, own)
    made = {row["key"] for row in own}
    missing = [run for run in runs if run.key(compare) not in made]
    return own, _not_made(((run.label, f"seed {run.seed}") for run in missing), len(runs))


def _frontier(config: SectionConfig, rows: Sequence[Row], root: Path) -> Section:
    own, note = _of_recipe(config, rows, root)
    if not own:
        return Section(rows=[])
    check_alike(own)
    points = points_of(own)
    figures = {"frontier": plot_frontier(points), "costs": plot_frontier(points, COSTS)}
    return Section(rows=own, tables=[*note, frontier_markdown(points)], figures=figures)


def _seconds(config: SectionConfig, rows: Sequence[Row], root: Path) -> Section:
    plan = load_seconds(root / config.recipe, config.settings)
    speeds = plan.speeds(read_rows(root / config.speeds))
    runs = plan.runs({method: speed["seconds_per_step"] for method, speed in speeds.items()})
    own = rows_of([run.planned for run in runs], plan.compare, _once(rows))
    if not own:
        return Section(rows=[])
    made = {row["key"] for row in own}
    seeds: dict[tuple[str, float], list[int]] = {}
    for run in runs:
        if run.planned.key(plan.compare) not in made:
            seeds.setdefault((run.method, run.seconds), []).append(run.planned.seed)
    note = _not_made(
        [
            (method, f"{point:g} s" if seed is None else f"{point:g} s with seed {seed}")
            for (method, point), those in seeds.items()
            for seed in (those if len(those) < len(plan.compare.seeds) else [None])
        ],
        len(runs),
        sum(map(len, seeds.values())),
    )
    table = seconds_table(plan, runs, own, speeds)
    return Section(rows=own, tables=[*note, seconds_markdown(table)], figures={"seconds": plot_seconds(table)})


def _comparison(config: SectionConfig, rows: Sequence[Row], root: Path) -> Section:
    own, note = _of_recipe(config, rows, root)
    if not own:
        return Section(rows=[])
    named: set[tuple[str, int]] = set()
    for row in own:
        if (name := (row["label"], row["seed"])) in named:
            raise UserError(
                f"section {config.title!r} of the report has two runs of {name[0]!r}, seed {name[1]}, with different "
                "settings: name a recipe, or leave one of the files of rows out"
            )
        named.add(name)
    tables = [*note, markdown_rows(columns_of(summarise(own)))]
    plot = config.plot or PlotConfig()
    copying = plot_copying(own)
    others = {} if copying is None else {"copying": copying}
    if not plot.x:
        return Section(rows=own, tables=tables, figures={"perplexity": _plot_labels(own), **others})
    points: dict[tuple[str, float], list[float]] = {}
    for row in own:
        settings = {**row["config"], "method": row["method"]}
        place = (_name(settings, plot.by), _product(settings, plot.x, config))
        points.setdefault(place, []).append(exp(row["summary"]["validation_loss"]))
    lines = _plot_lines(points, plot, "held-out perplexity")
    return Section(rows=own, tables=tables, figures={"perplexity": lines, **others})


def _table(config: SectionConfig, rows: Sequence[Row]) -> Section:
    if not rows:
        return Section(rows=[])
    names = config.columns or tuple(name for name in rows[0] if name not in ("machine", "date"))
    columns = {name.rpartition(".")[2].replace("_", " "): [_cell(_value(row, name)) for row in rows] for name in names}
    figures = {}
    if (plot := config.plot) is not None:
        points: dict[tuple[str, float], list[float]] = {}
        for row in rows:
            place = (_name(row, plot.by), _product(row, plot.x, config))
            points.setdefault(place, []).append(_product(row, (plot.y,), config))
        figures = {plot.y: _plot_lines(points, plot, plot.y.replace("_", " "))}
    return Section(rows=list(rows), tables=[markdown_rows(columns)], figures=figures)


def _once(rows: Sequence[Row]) -> list[Row]:
    """Rows without those that stand in several files, of which the last counts."""
    return list({row["key"]: row for row in rows}.values())


def _plot_labels(rows: Sequence[Row]) -> Figure:
    """Perplexity of each label, best on top, a dot per seed."""
    by_label: dict[str, list[float]] = {}
    for row in rows:
        by_label.setdefault(row["label"], []).append(exp(row["summary"]["validation_loss"]))
    labels = sorted(by_label, key=lambda label: statistics.fmean(by_label[label]), reverse=True)
    figure = Figure(figsize=(8, 0.8 + 0.3 * len(labels)), layout="constrained")
    axes = figure.subplots()
    for height, label in enumerate(labels):
        axes.plot(by_label[label], [height] * len(by_label[label]), "o", color="C0", markersize=5)
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel="held-out perplexity")
    finish(axes)
    return figure


def _plot_lines(points: Mapping[tuple[str, float], Sequence[float]], plot: PlotConfig, ylabel: str) -> Figure:
    """Means over x, a line per name; both axes logarithmic."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(dict.fromkeys(name for name, _ in points)):
        line = sorted((x, statistics.fmean(values)) for (other, x), values in points.items() if other == name)
        axes.plot([x for x, _ in line], [y for _, y in line], marker="o", label=name, **line_style(number))
    axes.set(xscale="log", yscale="log", xlabel=plot.xlabel or " x ".join(plot.x), ylabel=ylabel)
    ticks = sorted({x for _, x in points})
    axes.set_xticks(ticks, [f"{tick:,.6g}" for tick in ticks])
    axes.minorticks_off()
    if any(name for name, _ in points):
        add_legend(figure, axes)
    finish(axes)
    return figure


def _value(values: Row, key: str) -> Any:
    """`section.key` of nested values; None where it is not there."""
    found: Any = values
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _name(values: Row, keys: Sequence[str]) -> str:
    found = {key.rpartition(".")[2]: _value(values, key) for key in keys}
    if len(found) == 1:
        return "" if (only := next(iter(found.values()))) is None else str(only)
    return ", ".join(f"{key} {value}" for key, value in found.items() if value is not None)


def _product(values: Row, keys: Sequence[str], config: SectionConfig) -> float:
    factors = [_value(values, key) for key in keys]
    for key, factor in zip(keys, factors, strict=True):
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            raise UserError(
                f"section {config.title!r} of the report draws {key}, which in a row is {factor!r}: a number"
            )
    return math.prod(factors)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if type(value) is int else str(value)
