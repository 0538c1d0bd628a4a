"""Rules for all steps since a table's last sweep, for kernels that alone know which of them stale rows need."""

import torch
from torch import Tensor

from peerlm.ops.row_updates import CatchUpRules
from peerlm.optim.catch_up import MAX_NODES, RateHistory, catch_up_rules, missed_steps_that_matter

_MOST_HISTORIES = 8


class RecentRules:
    """The rules for every step of a history, kept from step to step.

    Momentum moves a row for so many steps (`missed_steps_that_matter`). Where these are over a rule is frozen: a later
    step multiplies its weights by 1 - lr * weight_decay and leaves its nodes. So few rules are fitted at each step.
    """

    def __init__(self, beta1: float, beta2: float):
        self._betas = beta1, beta2
        self._horizon = missed_steps_that_matter(beta1, beta2) if beta1 > 0 else 1
        self._clear()

    def _clear(self) -> None:
        self._seen: RateHistory | None = None
        self._frozen = 0
        self._num_nodes_S = torch.zeros(0, dtype=torch.int32)
        self._weights_SJ = torch.zeros(0, MAX_NODES, dtype=torch.float64)
        self._nodes_SJ = torch.ones(0, MAX_NODES, dtype=torch.float64)
        self._log_keep_S = torch.zeros(0, dtype=torch.float64)
        """log P up to the step for which a rule was fitted."""

    def up_to(self, history: RateHistory) -> CatchUpRules:
        """Rules for rows last right at any of the steps history.start .. history.now - 1."""
        if self._seen is not None and not _continues(history, self._seen):
            self._clear()
        self._fit(history)
        self._seen = history
        count = len(history.learning_rates)
        keep_S = (history.log_keep[-1] - self._log_keep_S).exp_()
        return CatchUpRules(
            history.start,
            torch.arange(count, dtype=torch.int32),
            -torch.expm1(history.log_keep[-1] - history.log_keep[:-1]),
            self._num_nodes_S,
            self._weights_SJ * keep_S[:, None],
            self._nodes_SJ,
        )

    def _fit(self, history: RateHistory) -> None:
        """Fit the rules that are not frozen."""
        count, frozen = len(history.learning_rates), self._frozen
        if count == frozen or (self._seen is not None and self._seen.now == history.now):
            return
        rules = catch_up_rules(history, torch.arange(history.start + frozen, history.now), *self._betas)
        self._num_nodes_S = torch.cat([self._num_nodes_S[:frozen], rules.num_nodes])
        self._weights_SJ = torch.cat([self._weights_SJ[:frozen], rules.weights])
        self._nodes_SJ = torch.cat([self._nodes_SJ[:frozen], rules.nodes])
        now_S = history.log_keep[-1].expand(count - frozen)
        self._log_keep_S = torch.cat([self._log_keep_S[:frozen], now_S])
        self._frozen = max(frozen, count - self._horizon + 1)


class SharedRules:
    """The rules of tables that have the same history, fitted once for all."""

    def __init__(self) -> None:
        self._by_history: dict[tuple[int, float, float], RecentRules] = {}

    def up_to(self, history: RateHistory, beta1: float, beta2: float) -> CatchUpRules:
        """As `RecentRules.up_to`."""
        key = (history.start, beta1, beta2)
        rules = self._by_history.pop(key, None) or RecentRules(beta1, beta2)
        self._by_history[key] = rules
        if len(self._by_history) > _MOST_HISTORIES:
            del self._by_history[next(iter(self._by_history))]
        return rules.up_to(history)


def is_same(history: RateHistory, other: RateHistory) -> bool:
    """Whether two histories are of the same steps, at the same learning rates and decays."""
    return history.now == other.now and _continues(history, other)


def _continues(history: RateHistory, earlier: RateHistory) -> bool:
    """Whether a history begins with an earlier one."""
    if history is earlier:
        return True
    count = len(earlier.learning_rates)
    return (
        (history.start, len(history.learning_rates) >= count) == (earlier.start, True)
        and _equal(history.learning_rates[:count], earlier.learning_rates)
        and _equal(history.log_keep[: count + 1], earlier.log_keep)
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() or torch.equal(a, b)
