"""Triton kernels that only move memory: what any kernel that moves as much cannot be faster than."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _gather(ids, table, out, P: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, W)
    total = tl.zeros((ROWS, W), tl.float32)
    for p in tl.static_range(0, P, ROWS):
        row = tl.load(ids + token * P + p + tl.arange(0, ROWS)).to(tl.int64)
        total += tl.load(table + row[:, None] * W + columns[None, :]).to(tl.float32)
    tl.store(out + token * W + columns, tl.sum(total, 0))


@triton.jit
def _update(ids, count, gradient, rows, m, v, W: tl.constexpr, BLOCK: tl.constexpr):
    entry = tl.program_id(0)
    while entry < count:
        row = tl.load(ids + entry).to(tl.int64)
        for begin in tl.static_range(0, W, BLOCK):
            columns = begin + tl.arange(0, BLOCK)
            at = row * W + columns
            g = tl.load(gradient + entry.to(tl.int64) * W + columns).to(tl.float32)
            new_m = tl.load(m + at).to(tl.float32) * 0.9 + g
            new_v = tl.load(v + at).to(tl.float32) * 0.9 + g
            new = tl.load(rows + at).to(tl.float32) * 0.9 + new_m + new_v
            tl.store(m + at, new_m.to(m.dtype.element_ty))
            tl.store(v + at, new_v.to(v.dtype.element_ty))
            tl.store(rows + at, new.to(rows.dtype.element_ty))
        entry += tl.num_programs(0)


def gather(table: Tensor, ids: Tensor, out: Tensor, *, tile_bytes: int = 1 << 14) -> None:
    """Read the rows of `table` (N, W) that ids (T, P) name; their sums by token go to `out` (T, W) float32.

    W and P are powers of two. A program asks for `tile_bytes` at a time.
    """
    tokens, per_token = ids.shape
    width = table.shape[1]
    rows = max(1, min(per_token, tile_bytes // (width * table.element_size())))
    warps = max(1, min(8, rows * width // 1024))
    _gather[(tokens,)](ids, table, out, P=per_token, W=width, ROWS=rows, num_warps=warps)


def update(ids: Tensor, gradient: Tensor, rows: Tensor, m: Tensor, v: Tensor, *, programs: int | None = None) -> None:
    """Read gradient (U, W), read and write rows, m and v (N, W) at the distinct ids (U,). W is a power of two.

    By `programs` that take one row after the other; one for each row if None.
    """
    width = rows.shape[1]
    grid = (min(len(ids), programs or len(ids)),)
    block = min(width, 1024)
    warps = max(1, min(4, block * rows.element_size() // 512))  # 16 bytes for each thread
    _update[grid](ids, len(ids), gradient, rows, m, v, W=width, BLOCK=block, num_warps=warps)


def zipf(shape: tuple[int, ...], n: int, device: str) -> Tensor:
    """Ids below n, int64, with frequencies like 1 / rank over a random order of rows."""
    ranks = n ** torch.rand(shape, device=device, dtype=torch.float64)  # P(rank < r) = log r / log N
    return torch.randperm(n, device=device)[(ranks.long() - 1).clamp(0, n - 1)]


def draw(shape: tuple[int, ...], n: int, device: str, kind: str) -> Tensor:
    """Ids below n, int64, "uniform" or "zipf"."""
    return torch.randint(n, shape, device=device) if kind == "uniform" else zipf(shape, n, device)
