"""Rules kept from step to step are those that are fitted anew."""

import math

import pytest
import torch
from torch import Tensor

from peerlm.optim import recent_rules
from peerlm.optim.catch_up import RateHistory, catch_up_rules
from peerlm.optim.recent_rules import RecentRules, SharedRules


def rate(number: int) -> float:
    return 5e-2 * (1 + math.cos(math.pi * number / 120))


def longer(history: RateHistory, steps: int) -> RateHistory:
    for _ in range(steps):
        history = history.append(rate(history.now), 0.1)
    return history


def assert_rules_of(rules: RecentRules, history: RateHistory, betas: tuple[float, float]) -> None:
    found = rules.up_to(history)
    since = torch.arange(history.start, history.now)
    expected = catch_up_rules(history, since, *betas)
    assert found.first_step == history.start
    assert torch.equal(found.index, torch.arange(len(since), dtype=torch.int32))
    assert torch.equal(found.num_nodes, expected.num_nodes)
    assert torch.equal(found.decay, expected.decay)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.nodes, expected.nodes, rtol=1e-9, atol=0)


@pytest.mark.parametrize("betas", [(0.5, 0.9), (0.0, 0.9)], ids=str)
def test_kept_rules_are_those_of_the_whole_history(betas: tuple[float, float]) -> None:
    rules, history = RecentRules(*betas), RateHistory.empty(7)
    for steps in (1, 1, 2, 30, 40, 1, 25):  # momentum is over after 38 steps
        history = longer(history, steps)
        assert_rules_of(rules, history, betas)
        assert_rules_of(rules, history, betas)


def test_another_history_begins_anew() -> None:
    rules, betas = RecentRules(0.5, 0.9), (0.5, 0.9)
    assert_rules_of(rules, longer(RateHistory.empty(0), 50), betas)
    other = RateHistory.empty(0)
    for _ in range(51):
        other = other.append(1e-3, 0.1)
    assert_rules_of(rules, other, betas)
    assert_rules_of(rules, longer(RateHistory.empty(0), 20), betas)


def test_a_step_fits_few_rules_and_tables_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[int] = []

    def counted(history: RateHistory, since: Tensor, *betas: float) -> object:
        fitted.append(len(since))
        return catch_up_rules(history, since, *betas)

    monkeypatch.setattr(recent_rules, "catch_up_rules", counted)
    shared, history = SharedRules(), longer(RateHistory.empty(0), 200)
    shared.up_to(history, 0.5, 0.9)
    twin = RateHistory(history.start, history.learning_rates.clone(), history.log_keep.clone())
    shared.up_to(twin, 0.5, 0.9)
    assert fitted == [200]
    shared.up_to(longer(history, 1), 0.5, 0.9)
    assert len(fitted) == 2
    assert fitted[1] < 50
