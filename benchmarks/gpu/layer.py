"""The whole layer beside others: forward, forward and backward, and a training step, in turn."""

from collections.abc import Callable

import torch
from contenders import (
    BACKENDS,
    PARTS,
    GroupedMoE,
    adamw,
    batches,
    case_of,
    dense,
    dense_hidden,
    peer,
    peer_pytorch,
    row_adamw,
)
from report import Report
from timing import Case
from torch import nn

Optimizers = Callable[[nn.Module], list[torch.optim.Optimizer]]


def run(report: Report) -> None:
    """The paper's shape at the usual number of tokens."""
    for part in PARTS:
        _compare(report, part, report.sizes.tokens, others=True)


def run_many_tokens(report: Report) -> None:
    """The same with so many tokens that gathered rows do not fit into memory."""
    for part in PARTS:
        _compare(report, part, report.sizes.many_tokens, others=part == "forward")


def run_one_head(report: Report) -> None:
    """One head of k experts: few bytes per token."""
    for tokens in (report.sizes.tokens, report.sizes.many_tokens):
        for part in PARTS:
            _compare(report, part, tokens, heads=1, others=False)


def _compare(report: Report, part: str, tokens: int, *, others: bool, heads: int | None = None) -> None:
    """Groups of contenders that fit into memory together; the first of each is what ratios are to."""
    sizes, device = report.sizes, report.device
    shape = {"tokens": tokens, "heads": heads or sizes.heads, "k": sizes.experts_per_head, "dim": sizes.dim}

    def timed(build: Callable[[], nn.Module], optimizers: Optimizers = adamw) -> Callable[[], Case]:
        def made() -> Case:
            module = build()
            inputs = batches(sizes, device, tokens, next(module.parameters()).dtype)
            return case_of(part, module, inputs, optimizers(module) if part == "step" else ())

        return made

    def ours(backend: str, row_format: str = "bfloat16", **settings: object) -> Callable[[], Case]:
        return timed(lambda: peer(sizes, device, backend, heads=heads, row_format=row_format), row_adamw(**settings))

    lazy = {"lazy": True, "state_dtype": torch.bfloat16}
    first = {
        "PEER-pytorch": timed(lambda: peer_pytorch(sizes, device, heads=heads)),
        "peerlm, triton": ours("triton", **lazy),
    }
    for name, hidden in dense_hidden(sizes, heads).items():
        if others or hidden == 4 * sizes.dim:
            first[name] = timed(lambda hidden=hidden: dense(sizes, device, hidden))
    if others:
        first["mixture of experts, grouped products"] = timed(lambda: GroupedMoE(sizes, device))
    groups = [first]
    for backend in BACKENDS:
        if backend == "reference" or (backend == "bag" and part == "forward"):
            groups.append({f"peerlm, {backend}": ours(backend, **lazy)})
    if part == "step":
        variants = {
            "peerlm, triton, moments in float32": ours("triton", lazy=True),
            "peerlm, triton, fused": ours("triton", **lazy, fused=True),
        }
        groups.append(variants)
    if part != "forward":
        for backend in ("triton", "reference"):
            name = f"peerlm, {backend}, float32" + (", exact AdamW" if part == "step" else "")
            groups.append({name: ours(backend, row_format="float32")})
    for contenders in groups:
        report.time(part, contenders, seconds=5, **shape)
