"""What isoFLOP curves are fitted with: a parabola in the logarithm of size, seeds' spread, the frontier over cost."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from scipy.stats import t as student

Place = Literal["inside", "below", "above", "no minimum", "too few sizes"]


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """The lowest point of a curve of loss over size."""

    place: Place
    """"inside" the sizes measured, or "below" or "above" them; "no minimum": the parabola opens downwards; "too few
    sizes": fewer than three, through which there is no parabola."""
    size: float | None
    """The parabola's lowest point; None without one."""
    loss: float | None
    """The parabola there; None unless it is inside, for outside it is a guess."""
    coefficients: tuple[float, float, float] | None
    """Of ln(size) squared, ln(size) and 1; None for fewer than three sizes."""


def fit_optimum(sizes: Sequence[float], losses: Sequence[float]) -> Optimum:
    """Least squares of a parabola in ln(size), as Hoffmann 2022 (arXiv 2203.15556, approach 2).

    Args:
        sizes: parameters, above 0, each once.
        losses: at these, nats per token.

    Raises:
        ValueError: unequal lengths, or a size twice.
    """
    if len(sizes) != len(losses) or len(set(sizes)) != len(sizes):
        raise ValueError(
            f"{len(sizes)} sizes, {len(set(sizes))} of them different, and {len(losses)} losses; pair them"
        )
    if len(sizes) < 3:
        return Optimum(place="too few sizes", size=None, loss=None, coefficients=None)
    logs = np.log(sizes)
    centre = logs.mean()  # for the sake of rounding
    a, b, c = (float(value) for value in np.polyfit(logs - centre, losses, 2))
    coefficients = (a, b - 2 * a * centre, c - b * centre + a * centre**2)
    if a <= 0:
        return Optimum(place="no minimum", size=None, loss=None, coefficients=coefficients)
    lowest = centre - b / (2 * a)
    place: Place = "below" if lowest < logs.min() else "above" if lowest > logs.max() else "inside"
    loss = c - b**2 / (4 * a) if place == "inside" else None
    return Optimum(place=place, size=math.exp(lowest), loss=loss, coefficients=coefficients)


@dataclass(frozen=True, kw_only=True)
class SeedSpread:
    """The standard deviation over seeds, pooled over all groups of runs that differ in the seed alone."""

    deviation: float | None
    """None where no group has two runs."""
    degrees: int
    """Runs less groups."""

    def half_width(self, runs: int) -> float | None:
        """Half the 95% confidence interval of the mean of this many runs (Student's t)."""
        if self.deviation is None:
            return None
        return float(student.ppf(0.975, self.degrees)) * self.deviation / math.sqrt(runs)


def pooled_spread(groups: Iterable[Sequence[float]]) -> SeedSpread:
    """Pool the variances of groups of at least two values, each weighing its degrees of freedom."""
    several = [group for group in groups if len(group) > 1]
    degrees = sum(len(group) - 1 for group in several)
    if not degrees:
        return SeedSpread(deviation=None, degrees=0)
    squares = sum((len(group) - 1) * statistics.variance(group) for group in several)
    return SeedSpread(deviation=math.sqrt(squares / degrees), degrees=degrees)


def frontier(costs: Sequence[float], losses: Sequence[float]) -> list[tuple[float, float]]:
    """The (cost, loss) of runs to which no other is both cheaper and better, by cost."""
    best: list[tuple[float, float]] = []
    for cost, loss in sorted(zip(costs, losses, strict=True)):
        if not best or loss < best[-1][1]:
            best.append((cost, loss))
    return best


def loss_at(cost: float, points: Sequence[tuple[float, float]]) -> float | None:
    """The loss at a cost on a frontier, linear in ln(cost) between runs; None outside of what they cost."""
    if not points or not points[0][0] <= cost <= points[-1][0]:
        return None
    logs = [math.log(point[0]) for point in points]
    return float(np.interp(math.log(cost), logs, [point[1] for point in points]))


def cost_of(loss: float, points: Sequence[tuple[float, float]]) -> float | None:
    """The cost at which a frontier reaches a loss, as `loss_at` reads it; None for a loss that no two runs enclose."""
    for (cheap, high), (dear, low) in pairwise(points):
        if low <= loss <= high:
            return math.exp(math.log(cheap) + (high - loss) / (high - low) * math.log(dear / cheap))
    return None
