"""What all plots have in common."""

import io
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from peerlm.files import write_bytes


def finish(axes: Axes) -> None:
    """A light grid, and no box."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def save_plot(figure: Figure, path: Path) -> None:
    """Write a plot, whole or not at all; the suffix of the path names the format."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.removeprefix(".") or "png", dpi=130)
    write_bytes(path, buffer.getvalue())
