"""The plot shows what compares: losses on the same windows."""

from pathlib import Path
from typing import Any

import pytest

from peerlm_studies.comparison.figures import plot_losses


def row(windows: int, final_windows: int) -> dict[str, Any]:
    losses = (3.0, 2.0, 1.0)
    return {
        "label": "dense",
        "config": {"eval": {"windows": windows, "final_windows": final_windows}},
        "curve": [{"flops": step, "seconds": step, "validation_loss": loss} for step, loss in enumerate(losses)],
    }


@pytest.mark.parametrize(("final_windows", "points"), [(8, 3), (9, 2)])
def test_a_last_loss_on_other_windows_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, final_windows: int, points: int
) -> None:
    from matplotlib.axes import Axes

    drawn: list[int] = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **style: (drawn.append(len(y)), plot(self, x, y, **style))[1])
    plot_losses([row(8, final_windows)], tmp_path / "loss.png")
    assert drawn == [points, points]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
