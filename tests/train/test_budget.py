"""Budgets: how many whole steps fit, and how far along a run is."""

import pytest

from peerlm.errors import UserError
from peerlm.train import BudgetConfig
from peerlm.train.budget import Budget


def plan(**budget: float) -> Budget:
    return Budget.plan(BudgetConfig(**budget), tokens_per_step=100, flops_per_token=6.0)


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        ({"steps": 7}, 7),
        ({"tokens": 799}, 7),
        ({"tokens": 100}, 1),
        ({"flops": 4799.0}, 7),
        ({"flops": 4800.0}, 8),
    ],
)
def test_whole_steps_within_the_budget_are_taken(budget: dict[str, float], steps: int) -> None:
    planned = plan(**budget)
    assert not planned.reached(steps - 1, seconds=1e9)
    assert planned.reached(steps, seconds=0.0)
    assert planned.progress(steps, seconds=0.0) == planned.next_progress(steps - 1, seconds=0.0) == 1.0
    assert planned.next_progress(0, seconds=0.0) == pytest.approx(1 / steps)


def test_minutes_count_seconds_alone() -> None:
    planned = plan(minutes=0.5)
    assert not planned.reached(10**9, seconds=29.0)
    assert planned.reached(1, seconds=30.0)
    assert planned.progress(5, seconds=15.0) == 0.5
    assert planned.next_progress(5, seconds=15.0) == pytest.approx(0.6)
    assert planned.next_progress(0, seconds=0.0) == 0.0
    assert planned.next_progress(5, seconds=29.0) == 1.0


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"tokens": 99}, "budget.tokens = 99 is less than one step, which takes 100"),
        ({"flops": 599.0}, "budget.flops = 599 is less than one step, which takes 600"),
    ],
)
def test_a_budget_below_one_step_is_refused(budget: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(**budget)
