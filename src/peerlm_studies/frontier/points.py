"""Rows to points, each a setting at a budget with its loss and costs, and which of them no other beats."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peerlm.errors import UserError
from peerlm.evaluate.likelihood import exp
from peerlm_studies.isoflop.fit import pooled_spread
from peerlm_studies.isoflop.seconds import comparable_seconds
from peerlm_studies.row_cost import read_bytes_per_token, row_bytes

Row = Mapping[str, Any]

EQUAL = 1.02
"""Times a cost up to which another counts as no dearer: sub-keys and rounding should not decide."""
ADAMW_BYTES = 8
"""AdamW's two moments of a parameter, in float32."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What a loss may cost."""

    title: str
    """Text at the axis."""
    unit: float
    """What an axis divides by."""
    at_equal_budget: bool
    """Whether runs compare within a budget alone; otherwise the budget is part of what is asked."""


MEASURES = {
    "bytes": Measure(title="KiB of parameters read per token, forward pass", unit=2**10, at_equal_budget=True),
    "decoding": Measure(title="KiB read per token, decoding alone", unit=2**10, at_equal_budget=True),
    "memory": Measure(title="MiB of weights and AdamW's moments", unit=2**20, at_equal_budget=True),
    "seconds": Measure(title="seconds of training", unit=1, at_equal_budget=False),
    "flops": Measure(title="training FLOPs", unit=1, at_equal_budget=False),
}
"""By name."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A setting at a budget, over its seeds."""

    label: str
    budget: str
    """As in "6.32e+12 FLOPs"."""
    seeds: tuple[int, ...]
    loss: float
    """Nats per token, the mean over seeds."""
    half_width: float | None
    """Half of its 95% confidence interval; None without two seeds of any setting at the budget."""
    costs: Mapping[str, float | None]
    """By the names of `MEASURES`; None where it is not known."""
    row_bytes: int | None
    """Of rows that a token gathers in a forward pass."""
    table_bytes: int | None
    """Of tables as they are stored."""
    device: str
    threads: int
    other_cores: float | None
    """How many cores other programs used meanwhile, the most over seeds; None where that was not measured."""

    @property
    def perplexity(self) -> float:
        """Of the mean loss."""
        return exp(self.loss)


def points_of(rows: Sequence[Row]) -> list[Point]:
    """Points of rows that `peerlm compare` or `peerlm isoflop` wrote, by budget and then loss.

    Seconds are those of `peerlm_studies.isoflop.seconds`, and known only where all runs were on CPUs, or none.

    Raises:
        UserError: a setting has two runs of one seed, or seeds of different models: rows of different studies.
    """
    groups: dict[tuple[str, str], dict[int, Row]] = {}
    sizes: dict[str, set[object]] = {}
    for row in rows:
        sizes.setdefault(budget_of(row), set()).add((row.get("sweep") or {}).get("size"))
    for row in rows:
        budget = budget_of(row)
        label = label_of(row, with_size=len(sizes[budget]) > 1)
        own = groups.setdefault((budget, label), {})
        same_seed = own.setdefault(row["seed"], row)
        if same_seed["key"] != row["key"]:
            raise UserError(
                f"{label!r} has two runs of seed {row['seed']} at {budget}, with different settings: name rows of one "
                "study, or leave one of the files out"
            )
        for other in own.values():
            if other["config"].get("model") != row["config"].get("model"):
                raise UserError(
                    f"{label!r} has runs of different models at {budget}, with seeds {other['seed']} and "
                    f"{row['seed']}: name rows of one study, or leave one of the files out"
                )
    losses = {place: [row["summary"]["validation_loss"] for row in own.values()] for place, own in groups.items()}
    spreads = {
        budget: pooled_spread(each for (other, _), each in losses.items() if other == budget) for budget, _ in groups
    }
    seconds = comparable_seconds(rows)
    points = []
    for (budget, label), own in groups.items():
        runs = list(own.values())
        held = row_bytes(runs[0])
        summary = runs[0]["summary"]
        memory = None if held is None else held["weight_bytes"] + ADAMW_BYTES * summary["total_parameters"]
        others = [row["summary"].get("other_cores") for row in runs]
        points.append(
            Point(
                label=label,
                budget=budget,
                seeds=tuple(sorted(own)),
                loss=statistics.fmean(losses[budget, label]),
                half_width=spreads[budget].half_width(len(runs)),
                costs={
                    "bytes": read_bytes_per_token(runs[0]),
                    "decoding": None if held is None else held["parameter_bytes_per_token"],
                    "memory": memory,
                    "seconds": _mean(seconds(row) for row in runs),
                    "flops": statistics.fmean(row["summary"]["flops"] for row in runs),
                },
                row_bytes=None if held is None else held["row_bytes_per_token"],
                table_bytes=None if held is None else held["table_bytes"],
                device=runs[0].get("machine", {}).get("accelerator") or summary["device"],
                threads=summary["threads"],
                other_cores=None if any(each is None for each in others) else max(others),
            )
        )
    flops = {budget: min(p.costs["flops"] or 0 for p in points if p.budget == budget) for budget, _ in groups}
    return sorted(points, key=lambda point: (flops[point.budget], point.budget, point.loss))


def front(points: Iterable[Point], measure: str) -> list[Point]:
    """Those to which no other is both cheaper and better, by cost; costs up to `EQUAL` times another's count as its."""
    known = [(cost, point) for point in points if (cost := point.costs[measure])]
    known.sort(key=lambda each: (each[0], each[1].loss))
    best: list[Point] = []
    for cost, point in known:
        as_cheap = [other.loss for other_cost, other in known if other_cost <= EQUAL * cost]
        if point.loss == min(as_cheap) and all(point.loss < other.loss for other in best):
            best.append(point)
    return best


def groups_of(points: Sequence[Point], measure: str) -> dict[str, list[Point]]:
    """Points that compare by a measure: by budget, or all."""
    if not MEASURES[measure].at_equal_budget:
        return {"": list(points)}
    return {budget: [p for p in points if p.budget == budget] for budget in dict.fromkeys(p.budget for p in points)}


def budget_of(row: Row) -> str:
    """What a run was to spend, as its configuration says."""
    budget = row["config"].get("budget") or {}
    for name, value in budget.items():
        if value is not None:
            return f"{value:.3g} {'FLOPs' if name == 'flops' else name}"
    return f"{row['summary']['flops']:.2g} FLOPs"


def label_of(row: Row, *, with_size: bool = True) -> str:
    """The method, with swept values that are no budget: a size by its name, others as key=value."""
    parts = [row["method"]]
    for key, value in (row.get("sweep") or {}).items():
        name = key.rpartition(".")[2]
        if name == "size" and not with_size:
            continue
        if name not in ("flops", "tokens", "steps", "minutes", "seconds"):
            parts.append(str(value) if name == "size" else f"{name}={value}")
    return " ".join(parts)


def _mean(values: Iterable[float | None]) -> float | None:
    found = list(values)
    known = [value for value in found if value is not None]
    return statistics.fmean(known) if known and len(known) == len(found) else None
