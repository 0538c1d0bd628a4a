"""What all plots have in common: names that cover no line, and lines that can be told apart."""

import pytest
from matplotlib.figure import Figure

from peerlm_studies.figures import add_legend, line_style


@pytest.mark.parametrize("count", [1, 6, 7, 30])
def test_names_cover_no_line(count: int) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number in range(count):
        axes.plot([0, 1], [number, number], label=f"{number}: a method of equal seconds", **line_style(number))
    add_legend(figure, axes)
    [legend] = figure.legends if count > 6 else [axes.get_legend()]
    assert len(legend.get_texts()) == count
    figure.draw_without_rendering()
    bounds, of_lines = legend.get_window_extent(), axes.get_window_extent()
    assert figure.bbox.x0 <= bounds.x0
    assert bounds.x1 <= figure.bbox.x1
    assert of_lines.height > 200
    assert (bounds.y1 <= of_lines.y0) == (count > 6)


def test_thirty_lines_differ_by_colour_or_dashes() -> None:
    assert len({tuple(line_style(number).values()) for number in range(30)}) == 30
