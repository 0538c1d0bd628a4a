"""What all plots have in common."""

from matplotlib.axes import Axes


def finish(axes: Axes) -> None:
    """A light grid, and no box."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
