"""The plot of a frontier: perplexity over a cost, the points that no other beats joined and named."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from peerlm_studies.figures import finish
from peerlm_studies.frontier.points import MEASURES, Point, front, groups_of

NAMED = 24
"""Points of a panel up to which those off the front are named too."""
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
            if leads or len(points) <= NAMED:
                axes.annotate(
                    point.label,
                    place,
                    xytext=(-5, -5) if leads else (5, 3),
                    textcoords="offset points",
                    horizontalalignment="right" if leads else "left",
                    verticalalignment="top" if leads else "bottom",
                    fontsize=9 if leads else 7,
                    fontweight="bold" if leads else "normal",
                    color="black" if leads else "0.55",
                )
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


def _plain_ticks(axes: Axes) -> None:
    """A handful of round numbers, written out, on either axis."""
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        narrow = high / low < NARROW
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]) if narrow else LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}" if value < 1e7 else f"{value:.3g}"))
