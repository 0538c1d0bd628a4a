"""The plot of a frontier: perplexity over a cost, the points that no other beats joined and named."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from peerlm_studies.figures import finish
from peerlm_studies.frontier.points import MEASURES, Point, front, groups_of

NAMED = 24
"""Points of a panel up to which those off the front are named too."""
CLOSE_COST, CLOSE_LOSS = 1.2, 0.006
"""Times a cost, and nats, within which names of points would lie on each other."""
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
    unit = MEASURES[measure].unit
    for index, (budget, own) in enumerate(groups.items()):
        colour = f"C{index % 10}"
        best = front(own, measure)
        drawn = [point for point in own if point.costs[measure]]
        for point in drawn:
            leads = point in best
            place = (point.costs[measure] / unit, point.perplexity)  # type: ignore[operator]
            axes.plot(*place, "o", color=colour, markersize=7 if leads else 4, alpha=1 if leads else 0.35)
            if leads:
                _name(axes, [point.label], place, (-5, -5), "right", fontsize=9, fontweight="bold", color="black")
        if len(points) <= NAMED:
            others = [point for point in drawn if point not in best]
            for together in _close(others, measure):
                place = (together[0].costs[measure] / unit, together[0].perplexity)  # type: ignore[operator]
                _name(axes, [point.label for point in together], place, (5, 3), "left", fontsize=7, color="0.45")
        line = [(point.costs[measure] / unit, point.perplexity) for point in best]  # type: ignore[operator]
        axes.plot([x for x, _ in line], [y for _, y in line], color=colour, linewidth=2, label=budget or None)
    axes.set(xscale="log", yscale="log", xlabel=MEASURES[measure].title)
    axes.margins(x=0.2, y=0.12)
    _plain_ticks(axes)
    if len(groups) > 1:
        axes.legend(frameon=False, title="training budget")
    elif "" not in groups:
        axes.set_title(f"lower left is better; all at {next(iter(groups))}", fontsize=10)
    finish(axes)


def _name(
    axes: Axes, labels: Sequence[str], place: tuple[float, float], by: tuple[float, float], side: str, **style: Any
) -> None:
    """Write labels beside a point, `by` points away, one below the other."""
    above = "top" if by[1] < 0 else "center" if len(labels) > 1 else "bottom"
    axes.annotate("\n".join(labels), place, by, textcoords="offset points", ha=side, va=above, **style)


def _close(points: Sequence[Point], measure: str) -> list[list[Point]]:
    """Points by loss, highest first, those together whose names would lie on each other."""
    groups: list[list[Point]] = []
    for point in sorted(points, key=lambda each: -each.loss):
        for group in groups:
            costs = (group[-1].costs[measure] or 1.0), (point.costs[measure] or 1.0)
            if max(costs) < CLOSE_COST * min(costs) and group[-1].loss - point.loss < CLOSE_LOSS:
                group.append(point)
                break
        else:
            groups.append([point])
    return groups


def _plain_ticks(axes: Axes) -> None:
    """A handful of round numbers, written out, on either axis."""
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        narrow = high / low < NARROW
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]) if narrow else LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}" if value < 1e7 else f"{value:.3g}"))
