"""The tables of a study of equal seconds: every method at every point, and the best of each family."""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from peerlm.errors import listed
from peerlm.evaluate.likelihood import exp
from peerlm.train.disturbance import disturbed
from peerlm_studies.equal_seconds.plan import SecondsPlan, TimedRun
from peerlm_studies.intervals import plus_minus
from peerlm_studies.isoflop.fit import pooled_spread
from peerlm_studies.markdown import markdown_rows
from peerlm_studies.scaling.points import kinds_of

Table = Sequence[Mapping[str, Any]]
"""What `seconds_table` returns."""


def seconds_table(
    plan: SecondsPlan, runs: Sequence[TimedRun], rows: Sequence[Mapping[str, Any]], speeds: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One row per point and method whose runs were made, over its seeds.

    Each has seconds, method, family (`families`), seeds, loss, half_width (of its 95% interval, from the spread of all
    methods at the point), perplexity, steps, tokens, seconds_per_step, threads, other_cores and `disturbed`, all three
    of the speed. `poor_loss` is that of the half of the windows in which fewest targets repeat; None where a run did
    not measure it.
    """
    by_key = {row["key"]: row for row in rows}
    groups: dict[tuple[float, str], list[Mapping[str, Any]]] = {}
    for run in runs:
        row = by_key.get(run.planned.key(plan.compare))
        if row is not None:
            groups.setdefault((run.seconds, run.method), []).append(row)
    losses = {place: [row["summary"]["validation_loss"] for row in own] for place, own in groups.items()}
    spreads = {point: pooled_spread(own for (other, _), own in losses.items() if other == point) for point, _ in groups}
    names = families({method: _kinds(own[0]["config"]["model"]) for (_, method), own in groups.items()})
    return [
        {
            "seconds": point,
            "method": method,
            "family": names[method],
            "seeds": [row["seed"] for row in own],
            "loss": (loss := statistics.fmean(losses[point, method])),
            "half_width": spreads[point].half_width(len(own)),
            "perplexity": exp(loss),
            "poor_loss": _poor_loss(own),
            "steps": own[0]["summary"]["steps"],
            "tokens": own[0]["summary"]["tokens"],
            **{name: speeds[method][name] for name in ("seconds_per_step", "threads", "other_cores")},
            "device": speeds[method]["machine"].get("accelerator", "cpu"),
            "disturbed": disturbed(speeds[method]["other_cores"]),
        }
        for (point, method), own in groups.items()
    ]


def families(kinds: Mapping[str, str]) -> dict[str, str]:
    """The family of each method: all with the same kinds of layers, by the words with which their names begin.

    Args:
        kinds: the kinds of layers of each method. They are the family's name where its methods' names share no first
            word, and behind these words where another family has the same ones.
    """
    shared = {kind: _shared_words([method for method in kinds if kinds[method] == kind]) for kind in kinds.values()}
    taken = Counter(shared.values())
    names = {kind: words if taken[words] == 1 else f"{words} ({kind})" for kind, words in shared.items() if words}
    return {method: names.get(kind, kind) for method, kind in kinds.items()}


def _shared_words(names: Sequence[str]) -> str:
    """The words with which all these names begin."""
    words = [name.split() for name in names]
    return " ".join(column[0] for column in takewhile(lambda column: len({*column}) == 1, zip(*words, strict=False)))


def best_of_families(table: Table, loss: str = "loss") -> dict[str, list[Mapping[str, Any]]]:
    """Of each family its lowest row at each point, by seconds; rows without this loss are left out."""
    lowest: dict[str, dict[float, Mapping[str, Any]]] = {}
    for row in table:
        if row[loss] is None:
            continue
        own = lowest.setdefault(row["family"], {})
        if row["seconds"] not in own or row[loss] < own[row["seconds"]][loss]:
            own[row["seconds"]] = row
    return {family: [own[point] for point in sorted(own)] for family, own in lowest.items()}


def seconds_markdown(table: Table) -> str:
    """Perplexity by method and point, with its interval where there are several seeds; an asterisk at the lowest.

    A second table has the lowest family at each point against the others. Where runs measured copying, both follow for
    the windows in which fewest targets repeat.
    """
    methods = list(dict.fromkeys(row["method"] for row in table))
    columns = {"method": methods, **_perplexities(table, "loss")}
    speeds = {row["method"]: row for row in table}
    columns["ms a step"] = [f"{1e3 * speeds[method]['seconds_per_step']:,.1f}" for method in methods]
    threads = sorted({f"{row['device']}, {row['threads']} threads" for row in table})
    notes = [
        f"Held-out perplexity after so many seconds of training steps, at speeds on {'; '.join(threads)}. "
        "An asterisk: the lowest of all."
    ]
    if busy := [method for method in methods if speeds[method]["disturbed"]]:
        notes.append(f"Other programs used the machine while speeds were measured of: {', '.join(busy)}.")
    if unknown := [method for method in methods if speeds[method]["disturbed"] is None]:
        notes.append(f"Whether they did is not known of: {', '.join(unknown)}.")
    text = f"{markdown_rows(columns)}\n{' '.join(notes)}\n{_best_markdown(table, 'loss')}"
    if any(row["poor_loss"] is not None for row in table):
        poor = markdown_rows({"method": methods, **_perplexities(table, "poor_loss")})
        text += f"\nThe same in the half of the windows in which fewest targets repeat:\n\n{poor}"
        text += _best_markdown(table, "poor_loss")
    return text


def _kinds(model: Mapping[str, Any]) -> str:
    return "+".join(sorted(kinds_of(model))) or "dense"


def _poor_loss(rows: Sequence[Mapping[str, Any]]) -> float | None:
    losses = [row["summary"].get("copying", {}).get("poor") for row in rows]
    return None if None in losses else statistics.fmean(losses)


def _perplexities(table: Table, name: str) -> dict[str, list[str]]:
    """Columns by point, a cell per method."""
    columns: dict[str, list[str]] = {}
    for point in dict.fromkeys(row["seconds"] for row in table):
        own = {row["method"]: row for row in table if row["seconds"] == point and row[name] is not None}
        best = min((row[name] for row in own.values()), default=math.nan)
        cells = []
        for method in dict.fromkeys(row["method"] for row in table):
            if method not in own:
                cells.append("")
                continue
            row, perplexity = own[method], exp(own[method][name])
            half = row["half_width"] if name == "loss" else None  # which is of the whole loss
            text = plus_minus(perplexity, None if half is None else perplexity * half, "{:,.1f}")
            cells.append(f"{text}*" if row[name] == best else text)
        columns[f"{point:,g} s"] = cells
    return columns


def _best_markdown(table: Table, name: str) -> str:
    """Each family's lowest perplexity, as far above the lowest of all; empty where there is one family."""
    best = best_of_families(table, name)
    if len(best) < 2:
        return ""
    columns: dict[str, list[str]] = {"family": list(best)}
    for point in sorted({row["seconds"] for row in table}):
        own = {family: row for family, rows in best.items() for row in rows if row["seconds"] == point}
        lowest = min(own.values(), key=lambda row: row[name], default=None)
        columns[f"{point:,g} s"] = [
            "" if lowest is None or family not in own else _above(own[family], lowest, name) for family in best
        ]
    note = "Each family at its best setting: by how much its perplexity is above the lowest of all."
    if name == "loss" and any(row["half_width"] is not None for row in table):
        note += " In brackets: by less than the intervals of both."
        points = {row["seconds"] for row in table}
        if alone := points - {row["seconds"] for row in table if row["half_width"] is not None}:
            note += f" At {listed(f'{point:g}' for point in sorted(alone))} seconds all have one seed, and no interval."
    return f"\n{note}\n\n{markdown_rows(columns)}"


def _above(row: Mapping[str, Any], lowest: Mapping[str, Any], name: str) -> str:
    if row is lowest:
        return "lowest"
    difference = row[name] - lowest[name]
    percent = 100 * math.expm1(difference)
    text = f"+{percent:,.0f}%" if percent >= 10 else f"+{percent:.1f}%"
    halves = [each["half_width"] for each in (row, lowest)] if name == "loss" else []
    return f"({text})" if halves and None not in halves and difference < math.hypot(*halves) else text
