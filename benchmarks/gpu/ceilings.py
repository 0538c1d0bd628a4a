"""The limits of the card: memory, its caches, sorting, matrix products, launches."""

import torch
import torch.nn.functional as F
from moves import draw, gather, update
from report import Report
from sizes import Sizes
from timing import Case


def run(report: Report) -> None:
    """Every ceiling, one row each."""
    sizes, device = report.sizes, report.device
    report.time("copy", {"torch": lambda: _copy(sizes, device)}, traffic=2 * sizes.copy_bytes)
    for kind in ("uniform", "zipf"):
        for width in sizes.row_widths:
            _gathers(report, width, kind, sizes.per_token)
    _gathers(report, 2 * sizes.dim, "uniform", sizes.experts_per_head)
    in_cache = min(sizes.num_experts, (16 << 20) // (4 * sizes.dim))
    _gathers(report, 2 * sizes.dim, "uniform", sizes.per_token, num_rows=in_cache)
    for width in (2 * sizes.narrow_dim, 2 * sizes.dim):
        _updates(report, width, torch.float32)
        _updates(report, width, torch.bfloat16)
    entries = sizes.tokens * sizes.per_token
    report.time("stable sort of int32 ids", {"torch": lambda: _sort(entries, sizes, device)}, entries=entries)
    flops = 2 * sizes.gemm**3
    report.time("matrix product, bfloat16", {"torch": lambda: _product(sizes.gemm, device)}, flops=flops, n=sizes.gemm)
    report.time("launch of an empty kernel", {"torch": lambda: _launch(device)})


def _copy(sizes: Sizes, device: str) -> Case:
    source, target = (torch.empty(sizes.copy_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    source.zero_()
    return lambda turn: target.copy_(source)


def _gathers(report: Report, width: int, kind: str, per_token: int, num_rows: int | None = None) -> None:
    sizes = report.sizes
    count = min(num_rows or sizes.num_experts, (1 << 31) // width)

    def table() -> torch.Tensor:
        return torch.empty(count, width, dtype=torch.bfloat16, device=report.device).normal_()

    def inputs() -> tuple[torch.Tensor, list[torch.Tensor]]:
        return table(), [draw((sizes.tokens, per_token), count, report.device, kind) for _ in range(3)]

    def triton(tile_bytes: int) -> Case:
        rows, ids = inputs()
        out = torch.empty(sizes.tokens, width, device=report.device)
        return lambda turn: gather(rows, ids[turn % 3], out, tile_bytes=tile_bytes)

    def bag() -> Case:
        rows, ids = inputs()
        return lambda turn: F.embedding_bag(ids[turn % 3], rows, mode="sum")

    def select() -> Case:
        rows, ids = inputs()
        out = torch.empty(sizes.tokens * per_token, width, dtype=rows.dtype, device=report.device)
        return lambda turn: torch.index_select(rows, 0, ids[turn % 3].flatten(), out=out)

    contenders = {
        "gather alone, 16 KB at a time": lambda: triton(1 << 14),
        "gather alone, 8 KB at a time": lambda: triton(1 << 13),
        "nn.EmbeddingBag": bag,
    }
    if width == 2 * sizes.dim:
        contenders["index_select, which writes too"] = select
    report.time(
        "gather in the L2 cache" if num_rows else "gather",
        contenders,
        traffic=sizes.tokens * per_token * 2 * width,
        tokens=sizes.tokens,
        row_bytes=2 * width,
        per_token=per_token,
        ids=kind,
        num_rows=count,
    )


def _updates(report: Report, width: int, dtype: torch.dtype) -> None:
    sizes, device = report.sizes, report.device
    touched = min(sizes.num_experts // 2, sizes.tokens * sizes.per_token)
    case, name = "read and write rows and two moments", str(dtype).removeprefix("torch.")

    def tables() -> list[torch.Tensor]:
        return [torch.zeros(sizes.num_experts, width, dtype=dtype, device=device) for _ in range(3)]

    rows_m_v = report.attempt(f"{case}: tables", tables, rows=name)
    if rows_m_v is None:
        return
    gradient = torch.zeros(touched, width, device=device)
    ids = [torch.randperm(sizes.num_experts, device=device)[:touched].sort().values for _ in range(2)]
    report.time(
        case,
        {
            "one program per row": lambda: lambda turn: update(ids[turn % 2], gradient, *rows_m_v),
            "persistent programs": lambda: (
                lambda turn: update(ids[turn % 2], gradient, *rows_m_v, programs=sizes.programs)
            ),
        },
        traffic=touched * width * (4 + 6 * dtype.itemsize),
        row_bytes=width * dtype.itemsize,
        rows=name,
        touched=touched,
    )


def _sort(entries: int, sizes: Sizes, device: str) -> Case:
    ids = [torch.randint(sizes.num_experts, (entries,), device=device, dtype=torch.int32) for _ in range(3)]
    return lambda turn: torch.sort(ids[turn % 3], stable=True)


def _product(n: int, device: str) -> Case:
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return lambda turn: a @ b


def _launch(device: str) -> Case:
    one = torch.zeros(1, device=device)
    return lambda turn: one.zero_()
