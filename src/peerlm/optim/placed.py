"""Numbers of a step where a device's kernels find them: in tensors that stay, so that graphs may be replayed."""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from peerlm.ops.row_updates import RowState, RowStep
from peerlm.optim.catch_up import RateHistory
from peerlm.optim.recent_rules import SharedRules, is_same


class Placed:
    """What the steps of an optimizer have placed on devices.

    Only kernels with `place_step` and `place_rules` need any; `optim/row_step.py` and the CPU's kernels do not. While a
    graph is captured nothing is placed: the graph reads what was placed before, and whatever is placed before a replay.
    """

    def __init__(self, most_rules: int) -> None:
        self._most_rules = most_rules
        self._tensors: dict[tuple[object, ...], Tensor] = {}
        self._rules = SharedRules()
        self._placed_rules: dict[tuple[object, ...], RateHistory] = {}

    def step(self, kernels: ModuleType, table: RowState, step: RowStep, *key: object) -> RowStep:
        """The step with its numbers placed in the tensor of this key, where the kernels take them from a device."""
        place: Callable[..., Tensor] | None = getattr(kernels, "place_step", None)
        if place is None:
            return step
        device = table.rows.device
        key = (*key, device)
        into = self._tensors.get(key)
        if into is None or not capturing(device):
            into = self._tensors[key] = place(step, device, into)
        return replace(step, placed=into)

    def rules(self, kernels: ModuleType, table: RowState, history: RateHistory, step: RowStep, *key: object) -> Tensor:
        """Rules for every step of a history, as `place_rules` of the kernels gives them, in the tensor of this key."""
        device = table.rows.device
        key = ("rules", *key, step.beta1, step.beta2, step.eps, device)
        into = self._tensors.get(key)
        if into is not None and (capturing(device) or is_same(history, self._placed_rules[key])):
            return into
        rules = self._rules.up_to(history, step.beta1, step.beta2)
        self._tensors[key] = kernels.place_rules(rules, step.eps, device, into, most=self._most_rules)
        self._placed_rules[key] = history
        return self._tensors[key]


def capturing(device: torch.device) -> bool:
    """Whether what is asked of a device now is not done, but kept in a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
