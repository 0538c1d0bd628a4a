"""What preserves earlier knowledge, as hooks: divergence from the model before, and replay of earlier text."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peerlm.data import window_order
from peerlm.evaluate.held_out import Windows
from peerlm.evaluate.likelihood import last_logits
from peerlm.train.checkpoint import TrainState
from peerlm.train.feed import sent
from peerlm.train.training import Hook, Training


class ReplayBuffer:
    """Windows of earlier text, which a model must not forget, in an endless order that depends on the seed alone.

    Texts take turns, so that each has an equal share, however long it is.

    Args:
        texts: windows of each text, and how many of them are remembered: the first ones of the order of
            `peerlm.data.batching`, or all where that is None.
        seed: of that order, and of the order here.
    """

    def __init__(self, texts: Sequence[tuple[Windows, int | None]], seed: int) -> None:
        self.seed = seed
        self.texts = [
            (windows, len(windows) if count is None else min(count, len(windows))) for windows, count in texts
        ]

    def draw(self, start: int, stop: int) -> Tensor:
        """Windows `start` up to `stop` of the order: (stop - start, context) int64."""
        return torch.stack([self._window(place) for place in range(start, stop)])

    def _window(self, place: int) -> Tensor:
        turn, text = divmod(place, len(self.texts))
        windows, count = self.texts[text]
        epoch, index = divmod(turn, count)
        remembered = window_order(index, count, self.seed + 1, epoch)
        return windows[window_order(remembered, len(windows), self.seed, 0)]


class Replay(Hook):
    """Lets windows of earlier text join each batch, `per_step` of them in the mean."""

    def __init__(self, buffer: ReplayBuffer, per_step: float) -> None:
        self.buffer, self.per_step = buffer, per_step

    def batch(self, training: Training, state: TrainState, input_ids_BT: Tensor) -> Tensor:
        """The batch, and after it what is replayed in this step."""
        start, stop = replayed(state.step, self.per_step)
        if stop == start:
            return input_ids_BT
        return torch.cat([input_ids_BT, sent(self.buffer.draw(start, stop), input_ids_BT.device)])


class Divergence(Hook):
    """Adds the gradient of the divergence from an earlier model, measured on earlier text in each step.

    Args:
        before: the earlier model, which is not changed.
        buffer: earlier text.
        weight: factor on the divergence beside the loss.
        windows: of earlier text in each step.
    """

    def __init__(self, before: nn.Module, buffer: ReplayBuffer, *, weight: float, windows: int) -> None:
        self.before, self.buffer, self.weight, self.windows = before, buffer, weight, windows

    def after_backward(self, training: Training, state: TrainState, seen: Any) -> dict[str, Any]:
        """A second backward pass; returns the divergence in nats per token."""
        first = state.step * self.windows
        compared = sent(self.buffer.draw(first, first + self.windows), training.ranks.device)
        away = divergence(training.model, self.before, compared)
        (self.weight * away).backward()
        return {"divergence": away.detach()}


def replayed(step: int, per_step: float) -> tuple[int, int]:
    """The places of a buffer's order that step number `step` replays, `per_step` of them in the mean."""
    return int(step * per_step), int((step + 1) * per_step)


def divergence(model: nn.Module, before: nn.Module, input_ids: Tensor) -> Tensor:
    """KL(before || model) of the next token in nats, the mean over input_ids (batch, length) but their last tokens.

    Gradients flow into `model` alone.
    """
    inputs = input_ids[:, :-1]
    with torch.no_grad():
        old = F.log_softmax(last_logits(before, inputs, inputs.shape[1]), dim=-1)
    new = F.log_softmax(last_logits(model, inputs, inputs.shape[1]), dim=-1)
    return F.kl_div(new.flatten(0, 1), old.flatten(0, 1), log_target=True, reduction="batchmean")
