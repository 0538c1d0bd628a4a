"""Rules for stale rows against the sums that they stand for, taken step by step."""

import math
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peerlm.ops.cpu import native
from peerlm.optim import catch_up
from peerlm.optim.catch_up import (
    MAX_NODES,
    TOLERANCE,
    RateHistory,
    catch_up_rules,
    check_betas,
    gauss_rules,
    missed_steps,
    missed_steps_that_matter,
)

ROOTS = torch.logspace(-12, 12, 97, dtype=torch.float64)
"""sqrt(v) / eps: from gradients far below eps to gradients far above."""


@pytest.fixture(scope="module", params=["native", "python"], autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Rules by the kernel and by its definition."""
    if request.param == "native" and native.unavailable():
        pytest.skip(native.unavailable())
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "python":
            patch.setattr(catch_up.api, "fit_rules", lambda *terms, **settings: None)
        yield request.param


def history_of(rates: list[float], weight_decay: float = 0.1) -> RateHistory:
    history = RateHistory.empty(0)
    for rate in rates:
        history = history.append(rate, weight_decay)
    return history


def cosine_rates(steps: int) -> list[float]:
    return [1e-2 * 0.5 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)]


def movement(rates: list[float], since: int, betas: tuple[float, float], weight_decay: float) -> Tensor:
    """What AdamW's missed steps subtract from a weight of 0, for m = eps = 1 and sqrt(v) = ROOTS, step by step."""
    beta1, beta2 = betas
    w, m, v = torch.zeros_like(ROOTS), 1.0, ROOTS.square()
    for step in range(since + 1, len(rates) + 1):
        m, v = beta1 * m, beta2 * v
        w = w * (1 - rates[step - 1] * weight_decay)
        w = w - rates[step - 1] * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + 1)
    return -w


def by_rule(rules, number: int) -> Tensor:
    return (rules.weights[number] / (ROOTS[:, None] + rules.nodes[number])).sum(-1)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95), (0.8, 0.95), (0.95, 0.98), (0.5, 0.9)], ids=str)
def test_every_rule_meets_its_tolerance_at_any_scale_of_gradients(betas: tuple[float, float]) -> None:
    rates = cosine_rates(420)[:400]
    since = torch.tensor([0, 1, 2, 5, 20, 60, 150, 300, 360, 380, 390, 396, 398, 399])
    rules = catch_up_rules(history_of(rates), since, *betas)
    for number, step in enumerate(since.tolist()):
        expected = movement(rates, step, betas, 0.1)
        assert ((by_rule(rules, number) - expected) / expected).abs().max() < 3 * TOLERANCE, step
    assert rules.num_nodes[-1] == 1  # one missed step is one fraction
    assert rules.num_nodes.max() > 2
    unused = torch.arange(MAX_NODES) >= rules.num_nodes[:, None]
    assert (rules.weights[unused] == 0).all()
    assert (rules.nodes > 0).all()


@given(
    st.lists(st.sampled_from([0.0, 1e-3, 0.01, 0.3]), min_size=2, max_size=40),
    st.data(),
    st.sampled_from([(0.9, 0.999), (0.9, 0.95), (0.3, 0.9)]),
    st.sampled_from([0.0, 0.5]),
)
def test_any_learning_rates(rates: list[float], data: st.DataObject, betas: tuple[float, float], decay: float) -> None:
    since = data.draw(st.integers(0, len(rates) - 1))
    rules = catch_up_rules(history_of(rates, decay), torch.tensor([since]), *betas)
    expected = movement(rates, since, betas, decay)
    torch.testing.assert_close(by_rule(rules, 0), expected, rtol=3 * TOLERANCE, atol=1e-300)
    kept = math.prod(Fraction(1) - Fraction(rate) * Fraction(decay) for rate in rates[since:])
    assert rules.decay[0].item() == pytest.approx(float(1 - kept), rel=1e-12, abs=1e-300)


def test_with_as_many_nodes_as_missed_steps_the_rule_is_the_sum() -> None:
    rates, betas = cosine_rates(20)[:13], (0.9, 0.95)
    for missed in range(1, MAX_NODES + 1):
        since = 13 - missed
        weights, nodes = gauss_rules(*missed_steps(history_of(rates), torch.tensor([since]), *betas), missed)
        expected = movement(rates, since, betas, 0.1)
        found = (weights / (ROOTS[:, None] + nodes)).sum(-1)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_more_nodes_than_missed_steps_do_no_harm() -> None:
    rates, betas = cosine_rates(20)[:13], (0.9, 0.95)
    weights, nodes = gauss_rules(*missed_steps(history_of(rates), torch.tensor([10]), *betas), MAX_NODES)
    expected = movement(rates, 10, betas, 0.1)
    torch.testing.assert_close((weights / (ROOTS[:, None] + nodes)).sum(-1), expected, rtol=1e-9, atol=0)


def test_the_rule_is_exact_far_below_and_far_above_eps() -> None:
    rates, betas = cosine_rates(420)[:400], (0.9, 0.95)
    a_SK, c_SK = missed_steps(history_of(rates), torch.tensor([40]), *betas)
    for num_nodes in (1, 3, 5):
        weights, nodes = gauss_rules(a_SK, c_SK, num_nodes)
        assert (weights / nodes).sum() == pytest.approx(a_SK.sum().item(), rel=1e-10)
        assert weights.sum() == pytest.approx((a_SK * c_SK).sum().item(), rel=1e-10)


def test_terms_left_out_do_not_matter() -> None:
    for beta1, beta2 in ((0.9, 0.999), (0.9, 0.95), (0.5, 0.9)):
        kept, ratio = missed_steps_that_matter(beta1, beta2), beta1 / math.sqrt(beta2)
        assert ratio**kept / (1 - ratio) <= 1.0001e-10


def test_steps_are_found_again_by_their_number() -> None:
    since = torch.tensor([3, 7, 8])
    rules = catch_up_rules(history_of(cosine_rates(10)), since, 0.9, 0.999)
    assert rules.first_step == 3
    assert rules.index[since - 3].tolist() == [0, 1, 2]
    assert (rules.index == -1).sum() == len(rules.index) - 3


def test_without_momentum_rows_only_decay() -> None:
    rules = catch_up_rules(history_of([0.1, 0.2, 0.3], 0.5), torch.tensor([1]), 0.0, 0.999)
    assert rules.num_nodes.tolist() == [0]
    assert rules.decay.item() == pytest.approx(1 - 0.9 * 0.85)


def test_a_history_may_begin_anywhere() -> None:
    rates = cosine_rates(50)
    late = RateHistory.empty(30)
    for rate in rates[30:]:
        late = late.append(rate, 0.1)
    whole = catch_up_rules(history_of(rates), torch.tensor([30, 44]), 0.9, 0.95)
    part = catch_up_rules(late, torch.tensor([30, 44]), 0.9, 0.95)
    torch.testing.assert_close(part.weights, whole.weights, rtol=1e-9, atol=0)
    torch.testing.assert_close(part.decay, whole.decay, rtol=1e-9, atol=0)


@pytest.mark.parametrize("rate", [math.nan, math.inf])
def test_rates_that_are_no_numbers_make_rules_that_are_none(rate: float) -> None:
    history = RateHistory(0, torch.tensor([0.1, rate, 0.1, 0.1]).double(), torch.zeros(5, dtype=torch.float64))
    assert not catch_up_rules(history, torch.tensor([0]), 0.9, 0.95).weights.isfinite().all()


def test_rates_of_zero_move_nothing() -> None:
    rules = catch_up_rules(history_of([0.0, 0.0, 0.0]), torch.tensor([0, 1, 2]), 0.9, 0.95)
    assert (rules.weights == 0).all()
    assert (rules.nodes > 0).all()


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95), (0.85, 0.9), (0.99, 0.999), (0.95, 0.98)], ids=str)
def test_usual_betas_pass(betas: tuple[float, float]) -> None:
    check_betas(*betas)


@pytest.mark.parametrize("betas", [(0.95, 0.95), (0.9, 0.8), (0.99, 0.9), (0.9, 0.9)], ids=str)
def test_betas_without_a_good_rule_are_refused(betas: tuple[float, float]) -> None:
    with pytest.raises(
        ValueError, match=r"rows cannot catch up accurately .* raise beta2, lower beta1, or pass lazy=True"
    ):
        check_betas(*betas)
