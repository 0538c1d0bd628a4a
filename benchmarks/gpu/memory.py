"""Peak memory of a training step, and at how many tokens it no longer fits."""

from collections.abc import Callable

import torch
from contenders import adamw, batches, case_of, peer, peer_pytorch, row_adamw
from report import Report
from torch import nn


def run(report: Report) -> None:
    """Each contender alone, at more and more tokens until it is out of memory."""
    sizes, device = report.sizes, report.device
    lazy = row_adamw(lazy=True, state_dtype=torch.bfloat16)
    fused = row_adamw(lazy=True, fused=True, state_dtype=torch.bfloat16)
    contenders: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], list[torch.optim.Optimizer]]]] = {
        "peerlm, triton": (lambda: peer(sizes, device, "triton"), lazy),
        "peerlm, triton, fused": (lambda: peer(sizes, device, "triton"), fused),
        "PEER-pytorch": (lambda: peer_pytorch(sizes, device), adamw),
        "peerlm, reference": (lambda: peer(sizes, device, "reference"), lazy),
    }
    for name, (build, optimizers) in contenders.items():
        tokens = sizes.tokens
        while tokens <= sizes.many_tokens:
            if not _measured(report, name, build, optimizers, tokens):
                break
            tokens *= 2


def _measured(
    report: Report,
    name: str,
    build: Callable[[], nn.Module],
    optimizers: Callable[[nn.Module], list[torch.optim.Optimizer]],
    tokens: int,
) -> bool:
    """One row: the peak of two steps. False where they failed."""

    def steps() -> float:
        if report.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        module = build()
        inputs = batches(report.sizes, report.device, tokens, torch.bfloat16)
        case = case_of("step", module, inputs, optimizers(module))
        for turn in range(2):
            case(turn)
        report.timer.synchronise()
        return torch.cuda.max_memory_allocated() / 2**30 if report.device == "cuda" else 0.0

    peak = report.attempt(f"step / {name}", steps, tokens=tokens)
    report.give_back()
    if peak is None:
        return False
    report.row(f"step / {name}", contender=name, peak_GiB=round(peak, 2), tokens=tokens)
    return True
