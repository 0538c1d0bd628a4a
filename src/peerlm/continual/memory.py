"""What keeps a model to what it knows: its divergence from the model before, and windows that are learned again."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peerlm.data import window_order
from peerlm.evaluate.held_out import Windows
from peerlm.evaluate.likelihood import last_logits


class Memory:
    """Windows of texts that a model shall not forget, in an endless order; what comes where depends on the seed alone.

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


def replayed(step: int, per_step: float) -> tuple[int, int]:
    """The places of the order that step number `step` learns once more, `per_step` of them in the mean."""
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
