"""What all plots have in common."""

import io
import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from peerlm.files import write_bytes

LINEAR_TICKS_UP_TO = 8
"""The highest over the lowest value of a logarithmic axis, from which on ticks are 1, 2 and 5 times powers of ten."""


def finish(axes: Axes) -> None:
    """A light grid, and no box."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def line_style(number: int) -> dict[str, Any]:
    """How the line of that number, from 0, is drawn: no other of the first 30 has its colour and its dashes."""
    return {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3]}


def add_legend(figure: Figure, axes: Axes, *, few: int = 6) -> None:
    """Name what is drawn: in the axes up to `few` names, else below the plot, where they cover nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return
    if len(labels) <= few:
        axes.legend(frameon=False)
        return
    inches = 0.6 + 0.075 * max(map(len, labels))
    columns = max(1, int(figure.get_figwidth() / inches))
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(labels) / columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")


def name_ticks(axes: Axes) -> None:
    """Round numbers along a logarithmic y axis: as on a linear one where that names the lower part of the axis too."""
    lowest, highest = axes.get_ylim()
    if lowest <= 0:  # nothing finite was drawn
        return
    linear = highest < LINEAR_TICKS_UP_TO * lowest
    locator = MaxNLocator(8, steps=[1, 2, 5, 10]) if linear else LogLocator(subs=(1.0, 2.0, 5.0))
    inside = [tick for tick in locator.tick_values(lowest, highest) if lowest <= tick <= highest]
    axes.set_yticks(inside, [f"{tick:,g}" for tick in inside])
    axes.minorticks_off()


def save_plot(figure: Figure, path: Path) -> None:
    """Write a plot, whole or not at all; the suffix of the path names the format."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.removeprefix(".") or "png", dpi=130)
    write_bytes(path, buffer.getvalue())
