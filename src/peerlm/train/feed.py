"""Batches on their way to a device: one is read ahead, and copied while the step before it runs."""

from collections.abc import Iterator
from typing import Protocol, cast

import torch
from torch import Tensor

from peerlm.data import Batch


class Courier(Protocol):
    """Copies batches to a device without waiting for it."""

    def send(self, batch: Batch) -> Batch:
        """Start to copy a batch; returns where it will be."""

    def receive(self, batch: Batch) -> Batch:
        """Let what is asked of the device from now on find a batch that was sent."""


class CudaCourier:
    """Copies pinned batches in a stream of its own, beside what a GPU computes."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def send(self, batch: Batch) -> Batch:
        """As `Courier.send`."""
        with torch.cuda.stream(self._stream):
            return Batch(input_ids=sent(batch["input_ids"], self._device))

    def receive(self, batch: Batch) -> Batch:
        """As `Courier.receive`."""
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        batch["input_ids"].record_stream(current)
        return batch


class Feed:
    """The batches of a stream, in their order, each sent when the one before is taken and `read_ahead` is called."""

    def __init__(self, stream: Iterator[Batch], courier: Courier | None) -> None:
        self._stream, self._courier = stream, courier
        self._sent: Batch | None = None

    @classmethod
    def to(cls, device: torch.device, stream: Iterator[Batch]) -> "Feed":
        """A feed for a device; for a CPU there is nothing to send."""
        return cls(stream, CudaCourier(device) if device.type == "cuda" else None)

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> Batch:
        if self._courier is None:
            return next(self._stream)
        self.read_ahead()
        batch, self._sent = self._sent, None
        return self._courier.receive(cast(Batch, batch))

    def read_ahead(self) -> None:
        """Read the next batch and send it, where it is not on its way."""
        if self._courier is not None and self._sent is None:
            self._sent = self._courier.send(next(self._stream))


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
