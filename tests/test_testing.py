"""The error budget by which tests judge numerics: what it lets pass, and what it must not."""

import math

import pytest
import torch
from torch import Tensor

from peerlm.testing import assert_within_budget

EXACT = torch.randn(256, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def off_by(error: float, *, seed: int = 1, exact: Tensor = EXACT) -> Tensor:
    """A float32 result whose error is this, relative to the root mean square of the exact one."""
    noise = torch.randn(exact.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    size = exact.square().mean().sqrt()
    return (exact + error * size * noise / noise.square().mean().sqrt()).float()


@pytest.mark.parametrize("error", [1e-5, 1e-3, 1e-1])
def test_the_budget_is_twice_what_the_plain_path_loses(error: float) -> None:
    plain = off_by(error)
    assert_within_budget(off_by(1.9 * error, seed=2), plain, EXACT)
    with pytest.raises(AssertionError, match=r"relative error \S+ is over the budget of"):
        assert_within_budget(off_by(2.1 * error, seed=2), plain, EXACT)


def test_an_exact_plain_path_leaves_one_rounding() -> None:
    exact = EXACT.float().double()
    epsilon = torch.finfo(torch.float32).eps
    assert_within_budget(off_by(0.5 * epsilon, exact=exact), exact.float(), exact)
    with pytest.raises(AssertionError, match="over the budget"):
        assert_within_budget(off_by(3 * epsilon, exact=exact), exact.float(), exact)


def test_the_message_names_the_tensor_that_errs() -> None:
    plain = {"value": off_by(1e-5), "gradient": off_by(1e-5, seed=2)}
    found = plain | {"gradient": off_by(1e-4, seed=3)}
    with pytest.raises(AssertionError, match=r"^gradient: relative error"):
        assert_within_budget(found, plain, {"value": EXACT, "gradient": EXACT})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_over_any_budget(value: float) -> None:
    found = off_by(1e-5)
    found[3, 4] = value
    with pytest.raises(AssertionError, match="over the budget"):
        assert_within_budget(found, off_by(1e-5, seed=2), EXACT)


def test_a_plain_path_that_is_not_finite_grants_nothing() -> None:
    plain = off_by(1e-5)
    plain[0, 0] = math.nan
    with pytest.raises(AssertionError, match="over the budget"):
        assert_within_budget(EXACT.float(), plain, EXACT)


@pytest.mark.parametrize(
    ("found", "plain", "exact"),
    [
        (EXACT[:5].float(), EXACT.float(), EXACT),
        (EXACT[0].float(), EXACT[0].float(), EXACT),  # would broadcast
        (EXACT.float().T, EXACT.float(), EXACT),
    ],
)
def test_shapes_must_be_alike(found: Tensor, plain: Tensor, exact: Tensor) -> None:
    with pytest.raises(AssertionError):
        assert_within_budget(found, plain, exact)


@pytest.mark.parametrize(("found", "plain"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_actual_and_plain_have_one_precision(found: torch.dtype, plain: torch.dtype) -> None:
    with pytest.raises(AssertionError):
        assert_within_budget(EXACT.to(found), EXACT.to(plain), EXACT)


def test_only_float64_is_exact() -> None:
    with pytest.raises(AssertionError):
        assert_within_budget(EXACT.float(), EXACT.float(), EXACT.float())


def test_results_have_the_same_names() -> None:
    with pytest.raises(AssertionError):
        assert_within_budget([EXACT.float()], [EXACT.float()] * 2, [EXACT] * 2)


def test_a_small_tensor_beside_a_large_one_is_measured_by_its_own_size() -> None:
    exact = {"large": EXACT, "small": EXACT * 1e-4}
    plain = {"large": off_by(1e-6), "small": off_by(1e-6, exact=exact["small"])}
    found = plain | {"small": off_by(1e-2, exact=exact["small"])}
    with pytest.raises(AssertionError, match=r"^small: "):
        assert_within_budget(found, plain, exact)


def test_what_vanishes_is_measured_by_the_largest() -> None:
    exact = {"value": EXACT, "zero": torch.zeros(256, 8, dtype=torch.float64)}
    rounded = torch.full((256, 8), 1e-8)
    assert_within_budget(
        {"value": EXACT.float(), "zero": rounded}, {"value": EXACT.float(), "zero": torch.zeros(256, 8)}, exact
    )
    with pytest.raises(AssertionError, match=r"^zero: "):
        assert_within_budget(
            {"value": EXACT.float(), "zero": 1e4 * rounded}, {"value": EXACT.float(), "zero": rounded}, exact
        )


def test_few_numbers_have_a_wider_budget_and_wrong_ones_are_far_over_it() -> None:
    exact = torch.tensor([1.0], dtype=torch.float64)
    plain = torch.tensor([1 + 2.0**-20])
    assert_within_budget(torch.tensor([1 + 2.0**-17]), plain, exact)
    with pytest.raises(AssertionError, match="over the budget"):
        assert_within_budget(torch.tensor([-1.0]), plain, exact)


def test_sparse_results_count_as_dense_and_empty_ones_pass() -> None:
    dense = EXACT.float() * (torch.arange(256) < 3)[:, None]
    assert_within_budget(dense.to_sparse(1), dense, dense.double())
    assert_within_budget(torch.zeros(0, 8), torch.zeros(0, 8), torch.zeros(0, 8, dtype=torch.float64))
