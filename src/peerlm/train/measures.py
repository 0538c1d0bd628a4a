"""What steps measure, kept on their device until somebody asks: a row of the log, or a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Unusable:
    """The first step whose numbers are not all finite."""

    step: int
    learning_rate: float
    name: str
    """Of the first of its numbers that is not."""
    value: float


class Measures:
    """The sum of the losses of an interval, the newest numbers by name, and the first that are not finite.

    To add waits for no device and leaves all tensors in their places, so that it may be part of a captured step.
    """

    def __init__(self, device: torch.device) -> None:
        self.newest: dict[str, float] = {}
        """The numbers of the last step, as they were when last read."""
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._unusable_at = torch.full((), -1, dtype=torch.int64, device=device)
        self._names: tuple[str, ...] = ()
        self._newest = self._unusable = torch.zeros(0, dtype=torch.float64, device=device)
        self._steps: list[tuple[int, float]] = []

    def begin(self, loss_sum: float = 0.0) -> None:
        """Begin an interval, or continue one whose losses have this sum."""
        self._loss_sum.fill_(loss_sum)

    def count_step(self, step: int, learning_rate: float) -> None:
        """Say of which step, counted from 1, the next numbers are."""
        self._steps.append((step, learning_rate))

    @torch.no_grad()
    def add(self, numbers: Mapping[str, Tensor]) -> None:
        """Add the numbers of a step, 0-dimensional, the loss first; their names are those of every step."""
        if tuple(numbers) != self._names:
            self._names = tuple(numbers)
            self._newest, self._unusable = (self._newest.new_zeros(len(numbers)) for _ in range(2))
        device = self._newest.device
        self._newest.copy_(torch.stack([number.detach().double().to(device) for number in numbers.values()]))
        self._loss_sum += self._newest[0]
        first = (self._unusable_at < 0) & ~self._newest.isfinite().all()
        self._unusable.copy_(torch.where(first, self._newest, self._unusable))
        self._unusable_at.copy_(torch.where(first, self._count, self._unusable_at))
        self._count += 1

    def read(self) -> tuple[float, Unusable | None]:
        """The sum of the interval's losses, and what has not been finite since the last read; waits for the device."""
        length = len(self._names)
        places = [self._loss_sum[None], self._unusable_at[None].double(), self._newest, self._unusable]
        loss_sum, at, *numbers = torch.cat(places).tolist()
        self.newest = dict(zip(self._names, numbers[:length], strict=True))
        unusable = None
        if at >= 0:
            step, learning_rate = self._steps[int(at)]
            pairs = zip(self._names, torch.tensor(numbers[length:]).isfinite().tolist(), numbers[length:], strict=True)
            name, value = next((name, value) for name, is_finite, value in pairs if not is_finite)
            unusable = Unusable(step=step, learning_rate=learning_rate, name=name, value=value)
        self._steps.clear()
        self._count.zero_()
        self._unusable_at.fill_(-1)
        return loss_sum, unusable
