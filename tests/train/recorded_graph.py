"""A stand-in for CUDA graphs on the CPU: operations are recorded with the numbers and memory that they had."""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from ..host_reads import NoHostReads

aten = torch.ops.aten


class RecordedGraph:
    """As `peerlm.train.captured.CudaGraph`: to capture changes no tensor, to replay runs the same operations again.

    What Python computes, such as a number that is passed to an operation, stays as it was. Whatever waits for the
    device raises RuntimeError.
    """

    made: ClassVar[list["RecordedGraph"]] = []
    capturing: ClassVar[bool] = False

    def __init__(self, earlier: "RecordedGraph | None") -> None:
        self.earlier, self.replays = earlier, 0
        self._calls: list[Callable[[dict[int, Tensor]], None]] = []
        self._kept: list[Any] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        RecordedGraph.made.append(self)

    def capture(self, work: Callable[[], None]) -> None:
        """Run `work`, keep its operations, and undo what they changed."""
        RecordedGraph.capturing = True
        random = torch.get_rng_state()
        try:
            with _Recording(self), NoHostReads():
                work()
        except AssertionError as error:
            raise RuntimeError(f"a graph cannot wait: {error}") from error
        finally:
            RecordedGraph.capturing = False
            torch.set_rng_state(random)
            for memory, value in self._before.values():
                memory.copy_(value)
            self._before.clear()

    def replay(self) -> None:
        """Run the operations again, in the same memory."""
        self.replays += 1
        sparse: dict[int, Tensor] = {}
        with torch.no_grad():
            for call in self._calls:
                call(sparse)

    def may_change(self, arguments: Any) -> None:
        """Remember the memory of all tensors among these."""
        for tensor in _strided(arguments):
            storage = tensor.untyped_storage()
            if storage.data_ptr() and storage.data_ptr() not in self._before:
                whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                self._before[storage.data_ptr()] = (whole, whole.clone())

    def record(self, function: Any, arguments: Any, options: Any, outputs: Any) -> None:
        """Keep an operation with its outputs, into whose memory a replay writes; sparse ones are made anew."""
        self._kept.append((arguments, options, outputs))
        inputs = {tensor.untyped_storage().data_ptr() for tensor in _strided((arguments, options))}

        def again(sparse: dict[int, Tensor]) -> None:
            now = tree_map(lambda each: sparse.get(id(each), each) if isinstance(each, Tensor) else each, arguments)
            found = function(*now, **options)
            for new, old in zip(tree_flatten(found)[0], tree_flatten(outputs)[0], strict=True):
                if not isinstance(old, Tensor) or new is old:
                    continue
                if old.layout != torch.strided:
                    sparse[id(old)] = new
                elif new.numel() and old.untyped_storage().data_ptr() not in inputs:  # empty ones are resized later
                    old.copy_(new)

        self._calls.append(again)


class _Recording(TorchDispatchMode):
    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function: Any, kinds: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        run = function
        if function is aten.add_.Tensor and arguments[0].is_sparse:
            run = _append_rows
        with _disable_current_modes():
            self.graph.may_change((arguments, options))  # not all schemas say so, as of a batch norm's statistics
            outputs = run(*arguments, **options)
        self.graph.record(run, arguments, options, outputs)
        return outputs


def _append_rows(gradient: Tensor, other: Tensor) -> Tensor:
    """The in-place sum of sparse tensors as a GPU computes it, of which the host knows the number of rows."""
    parts = gradient, other
    indices = torch.cat([part._indices() for part in parts], dim=1)
    values = torch.cat([part._values() for part in parts])
    return gradient.copy_(torch.sparse_coo_tensor(indices, values, gradient.shape, check_invariants=False))


def _strided(values: Any) -> Iterator[Tensor]:
    for value in tree_flatten(values)[0]:
        if isinstance(value, Tensor) and value.layout == torch.strided:
            yield value
