"""What all plots have in common."""

import io
import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from peerlm.files import write_bytes


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
    if len(labels) <= few:
        axes.legend(frameon=False)
        return
    inches = 0.6 + 0.075 * max(map(len, labels))
    columns = max(1, int(figure.get_figwidth() / inches))
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(labels) / columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")


def save_plot(figure: Figure, path: Path) -> None:
    """Write a plot, whole or not at all; the suffix of the path names the format."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.removeprefix(".") or "png", dpi=130)
    write_bytes(path, buffer.getvalue())
