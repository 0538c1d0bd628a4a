"""A training step without host synchronisation, and as a CUDA graph whose replays have the bits of eager steps."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from contenders import batches, check_backend, peer, row_adamw
from report import Report, SkippedError
from steps import TrainSteps, captured
from torch import Tensor, nn

STEPS = 4
MODES: dict[str, tuple[str, dict[str, object], int]] = {
    "lazy": ("bfloat16", {"lazy": True}, 1),
    "lazy, fused": ("bfloat16", {"lazy": True, "fused": True}, 1),
    "exact": ("float32", {}, 1),
    "exact, two micro-batches": ("float32", {}, 2),
}
"""Row format, settings of the optimizer, and into how many parts a batch is split."""
Facts = dict[str, object]


def run(report: Report) -> None:
    """For each optimizer: synchronisation, then the graph. Steps are those of `peerlm train`, clipping included."""
    with captured.own_stream(torch.device(report.device)):
        for backend in ("triton", "reference"):
            forward = f"{backend}, forward without synchronisation"
            report.check(forward, lambda backend=backend: _forward_without_waiting(report, backend))
            for mode in MODES:
                label = f"{backend}, step without synchronisation, {mode} AdamW"
                report.check(label, lambda backend=backend, mode=mode: _step_without_waiting(report, backend, mode))
        for mode in MODES:
            label = f"triton, same bits of steps twice, {mode} AdamW"
            report.check(label, lambda mode=mode: _twice(report, mode))
        for mode in MODES:
            label = f"triton, graph of a step has eager bits, {mode} AdamW"
            report.check(label, lambda mode=mode: _replayed(report, "triton", mode))


class _LossOf(nn.Module):
    """A layer as a model that gives its loss."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, input_ids: Tensor, labels: Tensor, use_cache: bool) -> SimpleNamespace:
        """Of vectors (T, D) in place of ids."""
        return SimpleNamespace(loss=self.layer(input_ids).float().square().mean())


class _Training:
    """A layer, its optimizer, and steps on batches in rotation."""

    def __init__(self, report: Report, backend: str, mode: str, *, graph: bool = False):
        check_backend(backend)
        row_format, settings, micro_batches = MODES[mode]
        torch.manual_seed(0)
        self.layer: nn.Module = peer(report.sizes, report.device, backend, row_format=row_format)
        (optimizer,) = row_adamw(**settings)(self.layer)
        self.steps = TrainSteps(
            _LossOf(self.layer),
            optimizer,
            report.device,
            graph=graph,
            micro_batches=micro_batches,
            table_max_norm=math.inf if settings.get("fused") else 1.0,
        )
        self.inputs = batches(report.sizes, report.device, report.sizes.tokens, next(self.layer.parameters()).dtype)

    def step(self, turn: int = 0) -> None:
        """One step."""
        self.steps.make(self.inputs[turn % len(self.inputs)])

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
    for _ in range(3):
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
            training.layer(training.inputs[0])

    return _without_waiting(report, forward)


def _step_without_waiting(report: Report, backend: str, mode: str) -> Facts:
    return _without_waiting(report, _Training(report, backend, mode).step)


def _twice(report: Report, mode: str) -> Facts:
    """Weights after some steps from the same start, in two runs."""
    found = []
    for _ in range(2):
        training = _Training(report, "triton", mode)
        for turn in range(STEPS):
            training.step(turn)
        found.append(training.weights())
        del training
        report.give_back()
    different = [name for name in found[0] if not torch.equal(found[0][name], found[1][name])]
    return {"ok": not different, "different": different}


def _replayed(report: Report, backend: str, mode: str) -> Facts:
    """Weights after some steps, eager and by replays of one graph, from the same start."""
    expected: dict[str, Tensor] = {}
    for graph in (False, True):
        training = _Training(report, backend, mode, graph=graph)
        for turn in range(captured.EAGER_STEPS + STEPS):
            training.step(turn)
        if report.device != "cuda":
            raise SkippedError("eager steps run; graphs need a GPU")
        if graph and training.steps.steps.obstacle:
            return {"ok": False, "not captured": training.steps.steps.obstacle}
        found = training.weights()
        if not graph:
            expected = found
        del training
        report.give_back()
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    return {"ok": not different, "different": different}
