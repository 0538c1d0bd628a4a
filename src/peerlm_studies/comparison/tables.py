"""Rows of finished runs to tables: means and spreads over seeds, in Markdown and on the terminal."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from peerlm.evaluate.likelihood import exp
from peerlm.terminal import print_table
from peerlm_studies.markdown import markdown_rows

Row = Mapping[str, Any]


COPYING = ("poor ppl", "rich ppl", "repeats ppl", "copied nats", "copies from", "to first token")
"""What tables say where runs measure copying: perplexity in windows with little and with much to copy, and of targets
that repeat; what random tokens cost less when they are repeated; after how many million tokens that began
(`COPIED_NATS`); the largest share of attention that a block gives to the first token."""
COPIED_NATS = 0.1
"""A model copies from the first evaluation on at which random tokens cost so much less when they are repeated."""


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One row per label, in the order of first appearance: means over its seeds, and the spread of perplexities.

    A perplexity is `{"mean": ..., "spread": ...}` over seeds; the spread is the sample standard deviation, None for one
    seed. A mean is None where a perplexity is infinite.
    """
    by_label: dict[str, list[Row]] = {}
    for row in rows:
        by_label.setdefault(row["label"], []).append(row)
    return [_summarise_label(label, group) for label, group in by_label.items()]


def _summarise_label(label: str, rows: Sequence[Row]) -> dict[str, Any]:
    summaries = [row["summary"] for row in rows]
    perplexities = {"validation": _over_seeds([exp(summary["validation_loss"]) for summary in summaries])}
    accuracies = {}
    for file in rows[0]["evaluation"]:
        results = [row["evaluation"][file] for row in rows]
        perplexities[file] = _over_seeds([math.inf if (ppl := r["perplexity"]) is None else ppl for r in results])
        if "accuracy" in results[0]:
            accuracies[file] = _over_seeds([result["accuracy"] for result in results])
    copying = [_copying(row) for row in rows]
    layers = [layer for summary in summaries for layer in summary["usage"].values()]
    return {
        "label": label,
        "method": rows[0]["method"],
        "sweep": rows[0]["sweep"],
        "seeds": sorted(row["seed"] for row in rows),
        "perplexity": perplexities,
        "accuracy": accuracies,
        "copying": {
            name: _over_seeds([found[name] for found in copying])
            for name in COPYING
            if all(name in found for found in copying)
        },
        "total_parameters": summaries[0]["total_parameters"],
        "active_parameters": summaries[0]["active_parameters"],
        **{
            name: statistics.fmean(summary[name] for summary in summaries)
            for name in ("tokens", "flops", "seconds", "tokens_per_second", "peak_memory_bytes")
        },
        "usage": statistics.fmean(layer["share"] for layer in layers) if layers else None,
        "unevenness": statistics.fmean(layer["unevenness"] for layer in layers) if layers else None,
    }


def _copying(row: Row) -> dict[str, float]:
    """What the last evaluation of a run in training measured of copying; nothing where it did not."""
    curve = row.get("curve") or [{}]
    found = curve[-1].get("copying")
    if found is None:
        return {}
    losses = {name: found[name] for name in ("poor", "rich", "repeats")}
    began = (point["tokens"] for point in curve if copied_nats(point.get("copying")) >= COPIED_NATS)
    tokens = next(began, None)
    figures = {
        **{f"{name} ppl": None if loss is None else exp(loss) for name, loss in losses.items()},
        "copied nats": copied_nats(found),
        "copies from": None if tokens is None else tokens / 1e6,
        "to first token": max(found["first_token"].values()) if found["first_token"] else None,
    }
    return {name: value for name, value in figures.items() if value is not None}


def copied_nats(copying: Mapping[str, Any] | None) -> float:
    """What random tokens cost less when they are repeated; 0 where it was not measured."""
    return 0.0 if copying is None else copying["first_half"] - copying["second_half"]


def _over_seeds(values: Sequence[float]) -> dict[str, float | None]:
    finite = all(math.isfinite(value) for value in values)
    spread = statistics.stdev(values) if len(values) > 1 and finite else None
    return {"mean": statistics.fmean(values) if finite else None, "spread": spread}


def columns_of(table: Sequence[Row]) -> dict[str, list[str]]:
    """Column titles and their cells, row by row."""
    files = [name for name in table[0]["perplexity"] if name != "validation"]
    columns = {
        "method": [row["label"] for row in table],
        "validation ppl": [_spread(row["perplexity"]["validation"]) for row in table],
    }
    for file in files:
        columns[f"{file} ppl"] = [_spread(row["perplexity"][file]) for row in table]
        if file in table[0]["accuracy"]:
            columns[f"{file} acc"] = [_spread(row["accuracy"][file], "{:.1%}") for row in table]
    for title in COPYING:
        form = "{:,.1f}" if title.endswith("ppl") else "{:,.1f}M" if title == "copies from" else "{:,.2f}"
        cells = [_spread(row["copying"][title], form) if title in row["copying"] else "" for row in table]
        if any(cells):
            columns[title] = cells
    return columns | {
        "parameters": [_millions(row["total_parameters"]) for row in table],
        "active": [_millions(row["active_parameters"]) for row in table],
        "tokens": [_millions(row["tokens"]) for row in table],
        "FLOPs": [f"{row['flops']:.2e}" for row in table],
        "seconds": [f"{row['seconds']:,.0f}" for row in table],
        "tokens/s": [f"{row['tokens_per_second']:,.0f}" for row in table],
        "peak MiB": [f"{row['peak_memory_bytes'] / 2**20:,.0f}" for row in table],
        "usage": ["" if row["usage"] is None else f"{row['usage']:.1%}" for row in table],
        "unevenness": ["" if row["unevenness"] is None else f"{row['unevenness']:.2f}" for row in table],
    }


def _spread(value: Mapping[str, float | None], form: str = "{:,.1f}") -> str:
    if value["mean"] is None:
        return "inf"
    mean, spread = form.format(value["mean"]), value["spread"]
    return mean if spread is None else f"{mean} ± {form.format(spread)}"


def _millions(count: float) -> str:
    return f"{count / 1e6:,.2f}M"


def markdown_table(table: Sequence[Row], *, command: str, rows: Sequence[Row]) -> str:
    """The table in Markdown, with the command that made it, the seeds, the machine and the date."""
    machine, seeds = rows[-1]["machine"], sorted({row["seed"] for row in rows})
    lines = [
        markdown_rows(columns_of(table)),
        f"`{command}`; seeds {', '.join(map(str, seeds))}, ± is the standard deviation over them; "
        f"{machine['cores']} cores, torch {machine['torch']}; {rows[-1]['date']}.",
        "",
    ]
    return "\n".join(lines)


def show_table(table: Sequence[Row], console: Console) -> None:
    """Show the table on the terminal, as `peerlm.terminal.print_table` does."""
    columns = columns_of(table)
    names = columns.pop("method")
    subjects = {name: {title: cells[place] for title, cells in columns.items()} for place, name in enumerate(names)}
    if not console.quiet:
        print_table("", subjects, console)
