"""The plot of a frontier: perplexity over a cost, the points that no other beats joined and named."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from peerlm_studies.figures import finish
from peerlm_studies.frontier.points import MEASURES, Point, front, groups_of

Placed = tuple[Point, float, float]
"""A point, and where it is drawn."""
NAMED = 24
"""Points of a panel up to which those off the front are named too."""
CLOSE = 0.025
"""Share of an axis within which names of points would lie on each other."""
NARROW = 6.0
"""Largest over smallest value of an axis up to which its numbers are evenly spaced, as on a linear one."""


def plot_frontier(points: Sequence[Point], measures: Sequence[str] = ("bytes",)) -> Figure:
    """A panel for each of these `MEASURES`: both axes logarithmic, lower left is better, a colour per budget."""
    figure = Figure(figsize=(max(7.5, 5 * len(measures)), 4.8), layout="constrained")
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axes, measure in zip(panels, measures, strict=True):
        _draw(axes, points, measure)
    panels[0].set_ylabel("held-out perplexity")
    return figure


def _draw(axes: Axes, points: Sequence[Point], measure: str) -> None:
    groups = groups_of(points, measure)
    for index, (budget, own) in enumerate(groups.items()):
        colour, best = f"C{index % 10}", _placed(front(own, measure), measure)
        for _, x, y in _placed(own, measure):
            axes.plot(x, y, "o", color=colour, markersize=4, alpha=0.35)
        xs, ys = [x for _, x, _ in best], [y for *_, y in best]
        axes.plot(xs, ys, "-", color=colour, linewidth=2, label=budget or None)
        axes.plot(xs, ys, "o", color=colour, markersize=7)
    axes.set(xscale="log", yscale="log", xlabel=MEASURES[measure].title)
    axes.margins(x=0.2, y=0.12)
    for own in groups.values():
        best = _placed(front(own, measure), measure)
        for point, x, y in best:
            _name(axes, [point.label], (x, y), (-5, -5), "right", fontsize=9, fontweight="bold", color="black")
        if len(points) <= NAMED:
            leads = [point for point, *_ in best]
            others = [each for each in _placed(own, measure) if each[0] not in leads]
            for together in _close(others, axes):
                labels = [point.label for point, *_ in together]
                _name(axes, labels, together[0][1:], (5, 3), "left", fontsize=7, color="0.45")
    _plain_ticks(axes)
    if len(groups) > 1:
        axes.legend(frameon=False, title="training budget")
    elif "" not in groups:
        axes.set_title(f"lower left is better; all at {next(iter(groups))}", fontsize=10)
    finish(axes)


def _placed(points: Sequence[Point], measure: str) -> list[Placed]:
    """Points of which the cost is known, with where they are drawn."""
    unit = MEASURES[measure].unit
    return [(point, cost / unit, point.perplexity) for point in points if (cost := point.costs[measure])]


def _name(
    axes: Axes, labels: Sequence[str], place: tuple[float, float], by: tuple[float, float], side: str, **style: Any
) -> None:
    """Write labels beside a point, `by` points away, one below the other."""
    height = "top" if by[1] < 0 or len(labels) > 1 else "bottom"
    axes.annotate("\n".join(labels), place, by, textcoords="offset points", ha=side, va=height, **style)


def _close(points: Sequence[Placed], axes: Axes) -> list[list[Placed]]:
    """Points from top to bottom, those together whose names would lie on each other."""
    wide, high = (math.log(ends[1] / ends[0]) for ends in (axes.get_xlim(), axes.get_ylim()))
    groups: list[list[Placed]] = []
    for each in sorted(points, key=lambda placed: -placed[2]):
        for group in groups:
            _, x, y = group[-1]
            if abs(math.log(each[1] / x)) < CLOSE * wide and math.log(y / each[2]) < CLOSE * high:
                group.append(each)
                break
        else:
            groups.append([each])
    return groups


def _plain_ticks(axes: Axes) -> None:
    """A handful of round numbers, written out, on either axis."""
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        narrow = high / low < NARROW
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]) if narrow else LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}" if value < 1e7 else f"{value:.3g}"))
