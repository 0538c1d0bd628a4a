"""Plots show what compares: losses on the same windows; copying where it was measured."""

from pathlib import Path
from typing import Any

import pytest

from peerlm_studies.comparison.figures import plot_copying, plot_losses


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


def test_copying_is_drawn_over_tokens_where_it_was_measured() -> None:
    def point(step: int, repeats: float | None) -> dict[str, Any]:
        return {"tokens": step * 1e6, "copying": {"repeats": repeats, "first_half": 8.0, "second_half": 8.0 - step}}

    found = plot_copying([row(8, 8), row(8, 8) | {"label": "PEER", "curve": [point(1, None), point(2, 5.0)]}])
    assert found is not None
    in_text, at_random = (axes.get_lines() for axes in found.axes)
    assert [line.get_label() for line in in_text] == ["PEER"]
    assert in_text[0].get_xdata().tolist() == [1, 2]
    assert str(in_text[0].get_ydata().tolist()) == "[nan, 5.0]"
    assert at_random[0].get_ydata().tolist() == [1, 2]
    assert plot_copying([row(8, 8)]) is None
