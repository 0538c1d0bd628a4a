"""What all plots have in common: names that cover no line, and lines that can be told apart."""

import math

import pytest
from matplotlib.figure import Figure

from peerlm_studies.figures import add_legend, line_style, name_ticks


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


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([40, 65], ["40", "45", "50", "55", "60", "65"]),
        ([11, 4000], ["10", "20", "50", "100", "200", "500", "1,000", "2,000", "5,000"]),
        ([0.3, 5], ["0.5", "1", "2", "5"]),
    ],
)
def test_ticks_of_a_logarithmic_axis_are_round_and_name_all_of_it(values: list[float], said: list[str]) -> None:
    axes = Figure().subplots()
    axes.plot([1, 2], values)
    axes.set(yscale="log")
    name_ticks(axes)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == said


@pytest.mark.parametrize("values", [[], [math.nan, math.inf]])
def test_a_plot_of_nothing_is_one_without_names(values: list[float]) -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.plot(range(len(values)), values)
    axes.set(yscale="log")
    name_ticks(axes)
    add_legend(figure, axes)
    assert axes.get_legend() is None
    figure.draw_without_rendering()
