"""Whether the optimizer by rows is right: the weights of dense AdamW, and the bits of the definition on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from report import Report, SkippedError
from torch import Tensor, nn

from peerlm.ops import api
from peerlm.ops.row_updates import prepare_rows
from peerlm.optim import RowAdamW

Facts = dict[str, object]
BITS: dict[str, tuple[torch.dtype, dict[str, object]]] = {
    "lazy, bfloat16": (torch.bfloat16, {"lazy": True}),
    "lazy, bfloat16, moments in bfloat16": (torch.bfloat16, {"lazy": True, "state_dtype": torch.bfloat16}),
    "lazy, float32": (torch.float32, {"lazy": True}),
    "lazy, row-wise": (torch.bfloat16, {"lazy": True, "row_wise": True}),
    "exact, float32": (torch.float32, {}),
}
"""Dtype of rows and settings of the optimizer."""
WITHIN = {"lazy, row-wise": 1e-2, "lazy, float32": 1e-6, "exact, float32": 1e-5}
"""Modes whose bits depend on the order of a sum, a fused product, or a fit: the relative difference allowed."""


def run(report: Report) -> None:
    """For each mode the definition; for the exact one also dense AdamW; then the same bits twice."""
    for mode in BITS:
        report.check(f"triton, rows, {mode}: as the definition on a CPU", lambda mode=mode: _as_defined(report, mode))
        report.check(f"triton, rows, {mode}: same bits twice", lambda mode=mode: _twice(report, mode))
    report.check("triton, rows, exact, float32: as dense AdamW", lambda: _as_dense(report))
    report.check("triton, rows, lazy, bfloat16: beyond 2^31 numbers", lambda: _large_offsets(report))


def _start(report: Report, dtype: torch.dtype) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Rows, and for each step distinct ids and their gradient; on the CPU."""
    draw, sizes = torch.Generator().manual_seed(0), report.sizes
    rows = torch.randn(sizes.optimizer_rows, 2, sizes.dim, generator=draw).to(dtype)
    steps = []
    for _ in range(sizes.optimizer_steps):
        ids = torch.randperm(sizes.optimizer_rows, generator=draw)[: sizes.optimizer_touched].sort().values
        steps.append((ids, torch.randn(len(ids), 2, sizes.dim, generator=draw).to(dtype)))
    return rows, steps


def _trained(report: Report, mode: str, device: str) -> Tensor:
    """The rows after all steps, all caught up, on the CPU."""
    dtype, settings = BITS[mode]
    start, steps = _start(report, dtype)
    rows = nn.Parameter(start.to(device))
    optimizer = RowAdamW([{"params": [rows], "name": "table"}], lr=1e-2, **settings)
    for number, (ids, gradient) in enumerate(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - number / (2 * len(steps)))
        prepare_rows(rows, ids.to(device))
        rows.grad = torch.sparse_coo_tensor(
            ids[None].to(device), gradient.to(device), start.shape, is_coalesced=True, check_invariants=False
        )
        optimizer.step()
    prepare_rows(rows, None)
    return rows.detach().cpu()


@contextmanager
def _definition() -> Iterator[None]:
    """No backend's kernels update rows: `optim/row_step.py` does."""
    kernels = api.row_kernels
    api.row_kernels = lambda table: None
    try:
        yield
    finally:
        api.row_kernels = kernels


def _as_defined(report: Report, mode: str) -> Facts:
    found = _trained(report, mode, report.device)
    with _definition():
        expected = _trained(report, mode, "cpu")
    error = _distance(found, expected)
    same = torch.equal(found, expected)
    return {"ok": same or error <= WITHIN.get(mode, 0.0), "same_bits": same, "error": error}


def _twice(report: Report, mode: str) -> Facts:
    return {"ok": torch.equal(_trained(report, mode, report.device), _trained(report, mode, report.device))}


def _as_dense(report: Report) -> Facts:
    found = _trained(report, "exact, float32", report.device)
    start, steps = _start(report, torch.float32)
    rows = nn.Parameter(start.double())
    optimizer = torch.optim.AdamW([rows], lr=1e-2)
    for number, (ids, gradient) in enumerate(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - number / (2 * len(steps)))
        rows.grad = torch.zeros_like(rows).index_copy(0, ids, gradient.double())
        optimizer.step()
    moved = (rows.detach() - start.double()).norm()
    error = float(f"{((found.double() - rows.detach()).norm() / moved).item():.3g}")
    return {"ok": error < 1e-4, "error": error}


def _large_offsets(report: Report) -> Facts:
    """Steps of the last rows of a table of more than 2^31 numbers against steps of the same rows in a small one."""
    count = report.sizes.over_2_31
    if not count:
        raise SkippedError("needs a GPU with 32 GiB")
    start, steps = _start(report, torch.bfloat16)
    found = []
    for num_rows in (len(start), count):
        rows = nn.Parameter(torch.zeros(num_rows, *start.shape[1:], dtype=torch.bfloat16, device=report.device))
        first = num_rows - len(start)
        rows.data[first:] = start.to(report.device)
        settings = {"lazy": True, "state_dtype": torch.bfloat16, "stochastic_rounding": False}
        optimizer = RowAdamW([{"params": [rows], "name": "table"}], lr=1e-2, **settings)
        for ids, gradient in steps[:2]:
            where = (ids + first)[None].to(report.device)
            values = gradient.to(report.device)
            rows.grad = torch.sparse_coo_tensor(where, values, rows.shape, is_coalesced=True, check_invariants=False)
            optimizer.step()
        found.append(rows.detach()[first:].cpu())
        numbers = rows.numel()
        del rows, optimizer
        report.give_back()
    return {"ok": torch.equal(*found), "numbers": numbers}


def _distance(found: Tensor, expected: Tensor) -> float:
    return float(f"{((found.double() - expected.double()).norm() / expected.double().norm()).item():.3g}")
