"""Rows of an isoFLOP study to its curves, its optima, and what each method reaches in equal seconds."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from peerlm.errors import UserError
from peerlm.evaluate.likelihood import exp
from peerlm_studies.isoflop.fit import Optimum, SeedSpread, cost_of, fit_optimum, frontier, loss_at, pooled_spread
from peerlm_studies.isoflop.plan import IsoflopPlan
from peerlm_studies.isoflop.seconds import Cost, Row


@dataclass(frozen=True, kw_only=True)
class Point:
    """One size of a method at one budget, over seeds."""

    size: str
    rows: dict[int, Row]
    """By seed."""
    loss: float
    """Mean over the seeds that every size has."""

    @property
    def active_parameters(self) -> int:
        """Parameters that a token touches: the size that curves go over."""
        return int(self.rows[min(self.rows)]["summary"]["active_parameters"])

    @property
    def losses(self) -> list[float]:
        """Of every seed."""
        return [row["summary"]["validation_loss"] for row in self.rows.values()]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A method at one budget: its sizes and their optimum."""

    method: str
    flops: float
    points: list[Point]
    """By active parameters."""
    optimum: Optimum

    @property
    def nearest(self) -> Point:
        """The size measured that is nearest to the optimum; where that is not inside, the best one."""
        if self.optimum.place == "inside":
            assert self.optimum.size is not None
            wanted = math.log(self.optimum.size)
            return min(self.points, key=lambda point: abs(math.log(point.active_parameters) - wanted))
        return min(self.points, key=lambda point: point.loss)


def curves_of(plan: IsoflopPlan, rows: Sequence[Row]) -> list[Curve]:
    """The curves of a plan from the rows that there are; methods and budgets without any are left out.

    Curves are fitted to the seeds of every run alone (compare.seeds): those of the optimum are not at every size.

    Raises:
        UserError: two sizes of a method have as many active parameters.
    """
    by_key = {row["key"]: row for row in rows}
    found: dict[tuple[str, float], dict[str, dict[int, Row]]] = {}
    for run in plan.runs(plan.all_seeds):
        row = by_key.get(run.planned.key(plan.compare))
        if row is not None:
            sizes = found.setdefault((run.method, run.flops), {})
            sizes.setdefault(run.size, {})[run.planned.seed] = row
    curves = []
    for (method, flops), sizes in found.items():
        seeds = _shared_seeds(sizes.values(), plan.compare.seeds)
        points = []
        for size, of_seed in sizes.items():
            losses = [of_seed[seed]["summary"]["validation_loss"] for seed in seeds if seed in of_seed]
            if losses:
                points.append(Point(size=size, rows=of_seed, loss=statistics.fmean(losses)))
        if points:
            points.sort(key=lambda point: point.active_parameters)
            for one, other in pairwise(points):
                if one.active_parameters == other.active_parameters:
                    raise UserError(
                        f"sizes {one.size!r} and {other.size!r} of {method} both have {one.active_parameters} active "
                        "parameters, over which a curve goes: leave one of them out of isoflop.budgets"
                    )
            optimum = fit_optimum([p.active_parameters for p in points], [p.loss for p in points])
            curves.append(Curve(method=method, flops=flops, points=points, optimum=optimum))
    return curves


def _shared_seeds(sizes: Iterable[Mapping[int, Row]], seeds: Sequence[int]) -> list[int]:
    """The seeds that every size has which has any of them, so that a curve compares sizes and no seeds; else all."""
    begun = [of_seed for of_seed in sizes if any(seed in of_seed for seed in seeds)]
    return [seed for seed in seeds if all(seed in of_seed for of_seed in begun)] or list(seeds)


def optima_table(curves: Sequence[Curve], seconds: Cost) -> list[dict[str, Any]]:
    """One row per method and budget: the optimum, and the run nearest to it over its seeds, with its seconds.

    A loss or the logarithm of a perplexity over seeds is a mean, with half of its 95% confidence interval. The spread
    over seeds is pooled over all runs of the budget: what seeds differ by changes with it.
    """
    points_of: dict[float, list[Point]] = {}
    for curve in curves:
        points_of.setdefault(curve.flops, []).extend(curve.points)
    files = list(dict.fromkeys(f for c in curves for p in c.points for r in p.rows.values() for f in r["evaluation"]))
    spreads = {
        flops: {
            None: pooled_spread(point.losses for point in points),
            **{file: pooled_spread(_log_perplexities(point, file) for point in points) for file in files},
        }
        for flops, points in points_of.items()
    }
    return [_optimum_row(curve, spreads[curve.flops], seconds) for curve in curves]


def _optimum_row(curve: Curve, spreads: Mapping[str | None, SeedSpread], seconds: Cost) -> dict[str, Any]:
    """`spreads`: of the logarithm of each file's perplexity, and under None of the loss."""
    point, spread = curve.nearest, spreads[None]
    summaries = [row["summary"] for row in point.rows.values()]
    perplexity = {"validation": _interval([exp(loss) for loss in point.losses], spread)}
    for file, of_file in spreads.items():
        if file is not None:
            perplexity[file] = _interval([exp(value) for value in _log_perplexities(point, file)], of_file)
    return {
        "method": curve.method,
        "flops": curve.flops,
        "place": curve.optimum.place,
        "optimum_parameters": curve.optimum.size,
        "optimum_loss": curve.optimum.loss,
        "size": point.size,
        "seeds": sorted(point.rows),
        "loss": statistics.fmean(point.losses),
        "loss_half_width": spread.half_width(len(point.losses)),
        "perplexity": perplexity,
        "active_parameters": point.active_parameters,
        "total_parameters": summaries[0]["total_parameters"],
        "tokens": summaries[0]["tokens"],
        "seconds": _mean_cost(point, seconds),
    }


def _interval(perplexities: Sequence[float], spread: SeedSpread) -> dict[str, float | None]:
    """Geometric mean, and half of the interval around it, which is one of the logarithm."""
    if not perplexities:
        return {"mean": None, "half_width": None}
    mean = math.exp(statistics.fmean(map(math.log, perplexities)))
    half = spread.half_width(len(perplexities))
    return {"mean": mean, "half_width": None if half is None else mean * half}


def _log_perplexities(point: Point, file: str) -> list[float]:
    found = [row["evaluation"].get(file, {}).get("perplexity") for row in point.rows.values()]
    return [math.log(perplexity) for perplexity in found if perplexity]


def rows_of_curves(curves: Sequence[Curve]) -> list[Row]:
    """The rows that curves were made of."""
    return [row for curve in curves for point in curve.points for row in point.rows.values()]


def _mean_cost(point: Point, cost: Cost) -> float | None:
    known = [each for row in point.rows.values() if (each := cost(row)) is not None]
    return statistics.fmean(known) if known else None


def flops_of_row(row: Row) -> float:
    """FLOPs of a run's training."""
    return float(row["summary"]["flops"])


def frontiers(curves: Sequence[Curve], cost: Cost) -> dict[str, list[tuple[float, float]]]:
    """By method, the (cost, loss) of the runs, of any size and budget, that none beats in both; means over seeds."""
    runs: dict[str, list[tuple[float, float]]] = {curve.method: [] for curve in curves}
    for curve in curves:
        for point in curve.points:
            if (mean := _mean_cost(point, cost)) is not None:
                runs[curve.method].append((mean, statistics.fmean(point.losses)))
    return {method: frontier(*zip(*points, strict=True)) for method, points in runs.items() if points}


def equal_loss_table(curves: Sequence[Curve], seconds: Cost) -> list[dict[str, Any]]:
    """By method, what the lowest loss that all methods reach costs: FLOPs and seconds, read from frontiers.

    Empty where there is none: no method costs less than its cheapest run.
    """
    over_flops, over_seconds = frontiers(curves, flops_of_row), frontiers(curves, seconds)
    loss = max((points[-1][1] for points in over_flops.values()), default=0.0)
    table = [
        {
            "method": method,
            "loss": loss,
            "flops": cost_of(loss, points),
            "seconds": cost_of(loss, over_seconds[method]) if method in over_seconds else None,
        }
        for method, points in over_flops.items()
    ]
    return table if any(row["flops"] for row in table) else []


def equal_seconds_table(curves: Sequence[Curve], seconds: Cost, *, columns: int = 4) -> dict[str, Any]:
    """What each method reaches in the same seconds: `seconds`, and by method the loss at each of these.

    The seconds are spread evenly in the logarithm over what every method was measured at; none where there is no such
    range.
    """
    found = frontiers(curves, seconds)
    low = max((points[0][0] for points in found.values()), default=0.0)
    high = min((points[-1][0] for points in found.values()), default=0.0)
    if not 0 < low < high:
        return {"seconds": [], "losses": {method: [] for method in found}}
    steps = [low * (high / low) ** (index / (columns - 1)) for index in range(columns)]
    steps[-1] = high
    losses = {method: [loss_at(step, points) for step in steps] for method, points in found.items()}
    return {"seconds": steps, "losses": losses}
