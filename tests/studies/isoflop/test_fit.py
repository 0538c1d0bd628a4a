"""Known parabolas, spreads and frontiers are found again, and what cannot be said is not said."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerlm_studies.isoflop.fit import cost_of, fit_optimum, frontier, loss_at, pooled_spread

SIZES = [2e5, 5e5, 1e6, 3e6]


@given(
    st.floats(min_value=math.log(SIZES[0]), max_value=math.log(SIZES[-1])), st.floats(0.01, 2.0), st.floats(1.0, 8.0)
)
def test_a_known_parabola_is_found(log_size: float, curvature: float, lowest: float) -> None:
    losses = [lowest + curvature * (math.log(size) - log_size) ** 2 for size in SIZES]
    optimum = fit_optimum(SIZES, losses)
    assert optimum.size == pytest.approx(math.exp(log_size), rel=1e-4)
    assert optimum.coefficients is not None
    fitted = np.polyval(optimum.coefficients, np.log(SIZES))
    np.testing.assert_allclose(fitted, losses, rtol=1e-6)
    if optimum.place == "inside":
        assert optimum.loss == pytest.approx(lowest, rel=1e-6)


@pytest.mark.parametrize(("size", "place"), [(1e6, "inside"), (1e5, "below"), (1e7, "above")])
def test_an_optimum_outside_of_the_sizes_is_called_so_and_has_no_loss(size: float, place: str) -> None:
    optimum = fit_optimum(SIZES, [3 + math.log(each / size) ** 2 for each in SIZES])
    assert optimum.place == place
    assert optimum.size == pytest.approx(size)
    assert optimum.loss == (pytest.approx(3) if place == "inside" else None)


def test_without_a_minimum_or_three_sizes_there_is_no_optimum() -> None:
    opens_down = fit_optimum(SIZES, [3 - math.log(each / 1e6) ** 2 for each in SIZES])
    assert (opens_down.place, opens_down.size, opens_down.loss) == ("no minimum", None, None)
    few = fit_optimum(SIZES[:2], [3.0, 2.0])
    assert (few.place, few.size, few.coefficients) == ("too few sizes", None, None)


def test_sizes_and_losses_must_pair() -> None:
    with pytest.raises(ValueError, match="3 sizes, 2 of them different, and 3 losses; pair them"):
        fit_optimum([1, 2, 2], [1.0, 2.0, 3.0])


def test_spreads_are_pooled_over_groups_and_intervals_are_students() -> None:
    spread = pooled_spread([[1.0, 3.0], [5.0], [10.0, 10.0]])
    assert spread.degrees == 2
    assert spread.deviation == pytest.approx(1.0)  # variances 2 and 0, each of one degree of freedom
    assert spread.half_width(2) == pytest.approx(4.303 / math.sqrt(2), rel=1e-3)  # t of a table, 2 degrees of freedom
    alone = pooled_spread([[1.0], [2.0]])
    assert (alone.deviation, alone.half_width(1)) == (None, None)


def test_a_frontier_has_what_nothing_beats_and_is_read_between_its_runs() -> None:
    points = frontier([1.0, 100.0, 10.0, 20.0], [5.0, 3.0, 4.0, 4.5])
    assert points == [(1.0, 5.0), (10.0, 4.0), (100.0, 3.0)]
    assert loss_at(math.sqrt(10), points) == pytest.approx(4.5)
    assert loss_at(100.0, points) == 3.0
    assert loss_at(0.5, points) is None
    assert loss_at(101.0, points) is None
    assert loss_at(1.0, []) is None
    assert cost_of(4.5, points) == pytest.approx(math.sqrt(10))
    assert cost_of(3.0, points) == pytest.approx(100.0)
    assert cost_of(5.1, points) is None
    assert cost_of(2.9, points) is None
