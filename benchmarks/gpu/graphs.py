"""A training step without host synchronisation, and as a CUDA graph whose replays have the bits of eager steps."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from contenders import batches, check_backend, peer, row_adamw
from report import Report, SkippedError
from torch import Tensor, nn

STEPS = 4
MODES: dict[str, tuple[str, dict[str, object]]] = {
    "lazy": ("bfloat16", {"lazy": True}),
    "lazy, fused": ("bfloat16", {"lazy": True, "fused": True}),
    "exact": ("float32", {}),
}
"""Row format and settings of the optimizer."""
Facts = dict[str, object]


def run(report: Report) -> None:
    """For each optimizer: synchronisation, then the graph."""
    for backend in ("triton", "reference"):
        forward = f"{backend}, forward without synchronisation"
        report.check(forward, lambda backend=backend: _forward_without_waiting(report, backend))
        for mode in MODES:
            label = f"{backend}, step without synchronisation, {mode} AdamW"
            report.check(label, lambda backend=backend, mode=mode: _step_without_waiting(report, backend, mode))
    for mode in MODES:
        report.check(f"triton, same bits of steps twice, {mode} AdamW", lambda mode=mode: _twice(report, mode))
    for mode in MODES:
        label = f"triton, graph of a step has eager bits, {mode} AdamW"
        report.check(label, lambda mode=mode: _replayed(report, "triton", mode))


class _Training:
    """A layer, its optimizer, and a step on a batch in a fixed place."""

    def __init__(self, report: Report, backend: str, mode: str):
        check_backend(backend)
        row_format, settings = MODES[mode]
        torch.manual_seed(0)
        self.layer: nn.Module = peer(report.sizes, report.device, backend, row_format=row_format)
        (self.optimizer,) = row_adamw(**settings)(self.layer)
        for group in self.optimizer.param_groups:
            if not group["rows"]:  # torch's AdamW wants it so for graphs
                group["lr"] = torch.tensor(group["lr"], device=report.device)
        dtype = next(self.layer.parameters()).dtype
        self.inputs = batches(report.sizes, report.device, report.sizes.tokens, dtype)
        self.x = self.inputs[0].clone()

    def step(self) -> None:
        """Forward, backward, update."""
        self.layer(self.x).float().square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def in_graph(self, name: str) -> AbstractContextManager[object]:
        """What the optimizer asks for around a capture or a replay; nothing where it does not know of graphs."""
        return getattr(self.optimizer, name, nullcontext)()

    def take(self, turn: int) -> None:
        """Put another batch into its place."""
        self.x.copy_(self.inputs[turn % len(self.inputs)])

    def weights(self) -> dict[str, Tensor]:
        """A copy of all weights."""
        return {name: tensor.clone() for name, tensor in self.layer.state_dict().items()}


@contextmanager
def _no_waiting(device: str) -> Iterator[None]:
    """Whatever waits for the device raises."""
    if device != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _without_waiting(report: Report, call: Callable[[], object]) -> Facts:
    for _ in range(2):
        call()
    if report.device == "cuda":
        torch.cuda.synchronize()
    try:
        with _no_waiting(report.device):
            call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return {"ok": False, "synchronises": _where(error)}
    if report.device != "cuda":
        raise SkippedError("it runs; only a GPU can be waited for")
    return {"ok": True}


def _where(error: BaseException) -> str:
    """The innermost line of ours that waited."""
    ours = [f for f in _frames(error) if "/peerlm/" in f]
    return ours[-1] if ours else str(error).splitlines()[0][:120]


def _frames(error: BaseException) -> list[str]:
    found, trace = [], error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        found.append(f"{file[file.rfind('/peerlm/') :] if '/peerlm/' in file else file}:{trace.tb_lineno}")
        trace = trace.tb_next
    return found


def _forward_without_waiting(report: Report, backend: str) -> Facts:
    training = _Training(report, backend, "lazy")

    def forward() -> None:
        with torch.no_grad():
            training.layer(training.x)

    return _without_waiting(report, forward)


def _step_without_waiting(report: Report, backend: str, mode: str) -> Facts:
    return _without_waiting(report, _Training(report, backend, mode).step)


def _twice(report: Report, mode: str) -> Facts:
    """Weights after some steps from the same start, in two runs."""
    found = []
    for _ in range(2):
        training = _Training(report, "triton", mode)
        for turn in range(STEPS):
            training.take(turn)
            training.step()
        found.append(training.weights())
        del training
        report.give_back()
    different = [name for name in found[0] if not torch.equal(found[0][name], found[1][name])]
    return {"ok": not different, "different": different}


def _replayed(report: Report, backend: str, mode: str) -> Facts:
    """Weights after some steps, eager and by replays of one graph, from the same start."""
    eager = _Training(report, backend, mode)
    for turn in range(2 + STEPS):
        eager.take(turn)
        eager.step()
    if report.device != "cuda":
        raise SkippedError("eager steps run; graphs need a GPU")
    expected = eager.weights()
    del eager
    report.give_back()
    captured = _Training(report, backend, mode)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for turn in range(2):
            captured.take(turn)
            captured.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with captured.in_graph("captured_step"), torch.cuda.graph(graph):
        captured.step()
    for turn in range(2, 2 + STEPS):
        captured.take(turn)
        with captured.in_graph("replayed_step"):
            graph.replay()
    found = captured.weights()
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    return {"ok": not different, "different": different}
