"""Known constants are found again from what they predict."""

import math

import numpy as np
import pytest
from scipy.optimize import approx_fprime

from peerlm_studies.scaling.fit import CONSTANTS, Law, RunPoint, _Problem, bootstrap, constants, fit_law, interval

HOFFMANN = Law(c=1.7, a=120.0, alpha=0.31, b=900.0, beta=0.37)
KRAJEWSKI = Law(c=0.47, a=18.1, alpha=0.115, b=30.8, beta=0.147, g=2.1, gamma=0.58)
PEER = Law(c=1.2, a=60.0, alpha=0.25, b=400.0, beta=0.3, g=30.0, gamma=0.7, epsilon=-0.05)


def points_of(
    law: Law, granularity: tuple[float, ...] = (1.0,), expansion: tuple[float, ...] = (1.0,), noise: float = 0.0
) -> list[RunPoint]:
    generator = np.random.default_rng(0)
    found = []
    for size in (1e5, 1e6, 1e7):
        for tokens in (1e6, 1e7, 1e8):
            for g in granularity:
                for e in expansion:
                    at = {"size": size, "tokens": tokens, "granularity": g, "expansion": e}
                    found.append(RunPoint(**at, loss=law.loss(**at) * math.exp(noise * generator.normal())))
    return found


@pytest.mark.parametrize(
    ("law", "granularity", "expansion"),
    [
        (HOFFMANN, (1.0,), (1.0,)),
        (KRAJEWSKI, (1.0, 4.0, 16.0), (1.0,)),
        (PEER, (16.0, 64.0, 256.0), (16.0, 256.0, 4096.0)),
    ],
    ids=["Hoffmann", "Krajewski", "PEER"],
)
def test_known_constants_are_recovered(law: Law, granularity: tuple[float, ...], expansion: tuple[float, ...]) -> None:
    fitted = fit_law(points_of(law, granularity, expansion), starts=12)
    for name in CONSTANTS:
        assert getattr(fitted, name) == pytest.approx(getattr(law, name), rel=5e-3), name


def test_the_law_is_the_one_of_its_paper() -> None:
    of_size = (2.1 / 16**0.58 + 18.1) / 1e8**0.115
    assert KRAJEWSKI.loss(size=1e8, tokens=1e9, granularity=16) == pytest.approx(0.47 + of_size + 30.8 / 1e9**0.147)
    assert PEER.loss(size=1e6, tokens=1e7, granularity=1, expansion=100) == pytest.approx(
        1.2 + 90 / (1e6**0.25 * 100**-0.05) + 400 / 1e7**0.3
    )


def test_slopes_are_those_of_the_loss() -> None:
    problem = _Problem(points_of(PEER, (16.0, 64.0, 256.0), (16.0, 256.0, 4096.0), noise=0.2))
    for seed in range(5):
        x = problem.start(np.random.default_rng(seed))
        slope = problem.value_and_slope(x)[1]
        np.testing.assert_allclose(slope, approx_fprime(x, problem.value, 1e-7), rtol=1e-3, atol=1e-4)


def test_a_law_and_its_variables_stand_for_each_other() -> None:
    problem = _Problem(points_of(PEER, (16.0, 64.0, 256.0), (16.0, 256.0, 4096.0)))
    again = problem.law(problem.of_law(PEER))
    for name in CONSTANTS:
        assert getattr(again, name) == pytest.approx(getattr(PEER, name)), name


def test_an_outlier_counts_little() -> None:
    points = points_of(HOFFMANN)
    wrong = RunPoint(size=3e6, tokens=3e7, loss=50.0)
    fitted = fit_law([*points, wrong], starts=8)
    at = {"size": 3e6, "tokens": 3e7}
    assert fitted.loss(**at) == pytest.approx(HOFFMANN.loss(**at), rel=0.1)


def test_draws_surround_the_truth() -> None:
    points = points_of(HOFFMANN, noise=0.01)
    fitted = fit_law(points, starts=8)
    laws = bootstrap(points, fitted, times=25)
    low, high = interval([law.loss(size=1e6, tokens=1e7) for law in laws])
    assert low < HOFFMANN.loss(size=1e6, tokens=1e7) < high
    assert high - low < 0.1 * HOFFMANN.loss(size=1e6, tokens=1e7)
    assert bootstrap(points, fitted, times=3, seed=1) == bootstrap(points, fitted, times=3, seed=1)


def test_what_is_not_varied_is_not_fitted() -> None:
    points = points_of(HOFFMANN, granularity=(64.0,), expansion=(1.0, 4.0))
    assert constants(points) == 5
    fitted = fit_law(points, starts=4)
    assert (fitted.g, fitted.gamma, fitted.epsilon) == (0.0, 0.0, 0.0)


def test_too_few_runs_and_impossible_ones_are_refused() -> None:
    points = points_of(HOFFMANN)
    with pytest.raises(ValueError, match="4 runs are too few to fit 5 constants; make more"):
        fit_law(points[:4])
    with pytest.raises(ValueError, match="4 different runs are too few to fit 5 constants; make more"):
        bootstrap(points[:4] * 2, HOFFMANN)
    with pytest.raises(ValueError, match="a run has a size, tokens, granularity, expansion or loss of 0 or less"):
        fit_law([*points, RunPoint(size=0.0, tokens=1.0, loss=1.0)])
