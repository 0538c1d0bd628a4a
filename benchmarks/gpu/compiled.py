"""PEER-pytorch by torch.compile, as it is by default and with all that max-autotune tries, beside ours."""

from collections.abc import Callable

import torch
from contenders import batches, case_of, peer, peer_pytorch
from report import Report
from timing import Case


def run(report: Report) -> None:
    """What is quickly compiled first, since max-autotune may use all the time that there is."""
    parts = ("forward", "backward")
    for part in parts:
        _compare(report, part, {"PEER-pytorch": None, "PEER-pytorch, compiled": "default"})
    if report.device == "cuda":
        for part in parts:
            _compare(report, part, {"PEER-pytorch, compiled, max-autotune": "max-autotune-no-cudagraphs"})


def _compare(report: Report, part: str, theirs: dict[str, str | None]) -> None:
    sizes, device = report.sizes, report.device

    def inputs() -> list[torch.Tensor]:
        return batches(sizes, device, sizes.tokens, torch.bfloat16)

    def compiled(mode: str | None) -> Case:
        layer = peer_pytorch(sizes, device)
        torch._dynamo.reset()
        # without a GPU it is only shown that the script works: C++ compilers take minutes
        how = {"mode": mode} if device == "cuda" else {"backend": "aot_eager"}
        return case_of(part, layer, inputs(), call=layer if mode is None else torch.compile(layer, **how))

    contenders: dict[str, Callable[[], Case]] = {}
    for name, mode in theirs.items():
        contenders[name] = lambda mode=mode: compiled(mode)
    contenders["peerlm, triton"] = lambda: case_of(part, peer(sizes, device, "triton"), inputs())
    shape = {"tokens": sizes.tokens, "heads": sizes.heads, "k": sizes.experts_per_head, "dim": sizes.dim}
    report.time(part, contenders, **shape)
