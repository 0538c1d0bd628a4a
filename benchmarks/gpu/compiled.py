"""PEER-pytorch by torch.compile, as it is by default and with all that max-autotune tries, beside ours."""

from collections.abc import Callable

import torch
from contenders import batches, case_of, peer, peer_pytorch
from report import Report
from timing import Case


def run(report: Report) -> None:
    """Forward first, then forward and backward; the quicker to compile first."""
    modes = {"compiled": None, "compiled, max-autotune": "max-autotune-no-cudagraphs"}
    for part in ("forward", "backward"):
        _compare(report, part, modes if report.device == "cuda" else {"compiled": None})


def _compare(report: Report, part: str, modes: dict[str, str | None]) -> None:
    sizes, device = report.sizes, report.device

    def ours(backend: str) -> Case:
        return case_of(part, peer(sizes, device, backend), batches(sizes, device, sizes.tokens, torch.bfloat16))

    def theirs(compiled: bool, mode: str | None) -> Case:
        layer = peer_pytorch(sizes, device)
        torch._dynamo.reset()
        call = torch.compile(layer, mode=mode) if compiled else layer
        return case_of(part, layer, batches(sizes, device, sizes.tokens, torch.bfloat16), call=call)

    contenders: dict[str, Callable[[], Case]] = {"PEER-pytorch": lambda: theirs(False, None)}
    contenders["peerlm, triton"] = lambda: ours("triton")
    for name, mode in modes.items():
        contenders[f"PEER-pytorch, {name}"] = lambda mode=mode: theirs(True, mode)
    shape = {"tokens": sizes.tokens, "heads": sizes.heads, "k": sizes.experts_per_head, "dim": sizes.dim}
    report.time(part, contenders, **shape)
