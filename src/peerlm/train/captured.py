"""Training steps as graphs: captured once for each kind of step, then replayed at the cost of one launch."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from peerlm.ops.tensors import read_at_once

log = logging.getLogger(__name__)

EAGER_STEPS = 3
"""Steps of a kind before one is captured: kernels compile, libraries choose, stale rows are first caught up."""


class Graph(Protocol):
    """What a device was asked once, to be asked again."""

    def capture(self, work: Callable[[], None]) -> None:
        """Keep what `work` asks of the device, which does none of it now. Raises RuntimeError where it waits for it."""

    def replay(self) -> None:
        """Ask it again, with the same memory."""


class CudaGraph:
    """A CUDA graph, in the current stream, which must not be the default one; `earlier` shares its memory."""

    def __init__(self, earlier: "CudaGraph | None") -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._pool = None if earlier is None else earlier._graph.pool()

    def capture(self, work: Callable[[], None]) -> None:
        """As `Graph.capture`."""
        with torch.cuda.graph(self._graph, pool=self._pool, stream=torch.cuda.current_stream()):
            work()

    def replay(self) -> None:
        """As `Graph.replay`."""
        self._graph.replay()


GRAPHS: dict[str, Callable[[Any], Graph]] = {"cuda": CudaGraph}
"""By type of device: what makes a graph, given an earlier one, or None, that is never replayed at the same time."""


def runs_ahead(device: torch.device) -> bool:
    """Whether Python does not wait for the steps on this device, so that their numbers are read now and then alone."""
    return device.type in GRAPHS or not read_at_once(device)


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Within this context a GPU works in another stream than the default one, in which nothing can be captured."""
    if device.type != "cuda":
        yield
        return
    outer, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(outer)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        outer.wait_stream(stream)


@dataclass(frozen=True)
class _Captured:
    graph: Graph
    input_ids: Tensor
    """What the graph reads, (B, T)."""
    result: Any
    """What the work returned: its tensors have new values after each replay."""


class Steps:
    """Makes the steps of a training: eagerly, or, once such a step has been captured, by its graph.

    Args:
        device: where they are made.
        optimizer: its `captured_step` and `replayed_step`, if it has any, stand around captures and replays.
        obstacle: why none is captured; empty where nothing is known that keeps them from it.
    """

    def __init__(self, device: torch.device, optimizer: torch.optim.Optimizer, obstacle: str = "") -> None:
        self.obstacle = obstacle
        self._device, self._optimizer = device, optimizer
        self._eager: dict[object, int] = {}
        self._captured: dict[object, _Captured] = {}

    def make(self, kind: object, input_ids_BT: Tensor, work: Callable[[Tensor], Any]) -> Any:
        """Make a step on a batch; returns what `work` returned, now or when it was captured.

        kind: equal for steps of which Python does the same; None for one that must be eager.
        work: the whole step on a batch. What it returns may have tensors, which the next step of this kind changes.
        """
        if self.obstacle or kind is None:
            return work(input_ids_BT)
        kind = (kind, input_ids_BT.shape)
        captured = self._captured.get(kind)
        if captured is None:
            done = self._eager.setdefault(kind, 0)
            self._eager[kind] += 1
            captured = self._capture(input_ids_BT, work) if done >= EAGER_STEPS else None
            if captured is None:
                return work(input_ids_BT)
            self._captured[kind] = captured
        captured.input_ids.copy_(input_ids_BT)
        with self._around("replayed_step"):
            captured.graph.replay()
        return captured.result

    def _capture(self, input_ids_BT: Tensor, work: Callable[[Tensor], Any]) -> _Captured | None:
        """None where it fails; then no other step is captured either."""
        static_BT, results = input_ids_BT.clone(), []
        earlier = next(iter(self._captured.values()), None)
        graph = GRAPHS[self._device.type](None if earlier is None else earlier.graph)
        try:
            with self._around("captured_step"):
                graph.capture(lambda: results.append(work(static_BT)))
        except RuntimeError as error:
            self.obstacle = str(_first(error)).partition("\n")[0]
            log.warning("steps are not captured in graphs, and so are slower: %s", self.obstacle)
            return None
        return _Captured(graph, static_BT, results[0])

    def _around(self, name: str) -> AbstractContextManager[object]:
        return getattr(self._optimizer, name, nullcontext)()


def _first(error: BaseException) -> BaseException:
    """The error that came first: one within a capture makes the end of the capture fail, too."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return error
