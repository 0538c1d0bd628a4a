"""Budgets: how many whole steps fit, and how far along a run is."""

import pytest

from peerlm.errors import UserError
from peerlm.train import BudgetConfig
from peerlm.train.budget import Budget


def plan(**budget: float) -> Budget:
    return Budget.plan(BudgetConfig(**budget), tokens_per_step=100, flops_per_token=[6.0])


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


def grown(**budget: float) -> Budget:
    return Budget.plan(BudgetConfig(**budget), tokens_per_step=10, flops_per_token=[1.0, 2.0, 5.0], shares=[0.5, 0.75])


@pytest.mark.parametrize(
    ("budget", "changes", "steps"),
    [
        ({"steps": 8}, (4, 6), 8),
        ({"tokens": 80}, (4, 6), 8),
        ({"flops": 800.0}, (40, 50), 54),  # 400 at 10, 200 at 20, 200 at 50
        ({"flops": 1200.0}, (60, 75), 81),
    ],
)
def test_steps_that_cost_more_are_fewer(budget: dict[str, float], changes: tuple[int, int], steps: int) -> None:
    planned = grown(**budget)
    assert planned.changes == changes
    assert [planned.changes_due(step, 0.0) for step in (0, changes[0] - 1, *changes)] == [0, 0, 1, 2]
    assert planned.reached(steps, 0.0)
    assert not planned.reached(steps - 1, 0.0)
    shares = [planned.progress(step, 0.0) for step in (0, changes[0], changes[1], steps)]
    assert shares == [0.0, 0.5, 0.75, 1.0]
    between = planned.progress((changes[0] + changes[1]) / 2, 0.0)
    assert between == pytest.approx(0.625)


def test_what_is_left_of_a_part_is_for_the_next_one() -> None:
    planned = Budget.plan(
        BudgetConfig(steps=10), tokens_per_step=10, flops_per_token=[1.0, 2.0, 5.0], shares=[0.25, 0.55]
    )
    assert planned.changes == (2, 5)
    assert planned.limit == 10


def test_a_change_within_a_budget_of_minutes() -> None:
    planned = grown(minutes=1.0)
    assert planned.changes == (30.0, 45.0)
    assert [planned.changes_due(9, seconds) for seconds in (29.0, 30.0, 50.0)] == [0, 1, 2]
    assert planned.progress(9, 40.0) == pytest.approx(2 / 3)


def test_a_part_of_a_budget_below_one_step_is_refused() -> None:
    with pytest.raises(UserError, match=r"budget\.flops = 100 is less than one step from 75% to 100%, which takes 50"):
        grown(flops=100.0)
