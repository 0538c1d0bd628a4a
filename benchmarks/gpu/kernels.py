"""Our operators beside the limits of the card: the same ids, the same rows, in turn."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from contenders import BACKENDS, check_backend
from moves import draw, gather, update
from report import Report
from timing import Case
from torch import Tensor, nn

from peerlm.ops import api
from peerlm.optim import RowAdamW


def run(report: Report) -> None:
    """Retrieval, expert mixing and the update of rows."""
    sizes = report.sizes
    for tokens in (sizes.tokens, sizes.many_tokens):
        for heads in (sizes.heads, 1):
            _retrieval(report, heads, tokens)
    for dim in (sizes.dim, sizes.narrow_dim):
        for kind in ("uniform", "zipf"):
            _experts_forward(report, dim, kind, sizes.tokens)
    for tokens in (sizes.many_tokens, 1):
        _experts_forward(report, sizes.dim, "uniform", tokens)
    _experts_backward(report, "uniform")
    _row_update(report, torch.float32)
    _row_update(report, torch.bfloat16)


def _retrieval(report: Report, heads: int, tokens: int) -> None:
    sizes, device = report.sizes, report.device
    n = math.isqrt(sizes.num_experts)

    def inputs() -> tuple[list[Tensor], Tensor]:
        queries = [torch.randn(tokens, heads, sizes.key_dim, device=device).bfloat16() for _ in range(3)]
        half = sizes.key_dim // 2
        return queries, (torch.rand(2, heads, n, half, device=device) * 2 - 1).mul(half**-0.5).bfloat16()

    def torch_alone() -> Case:
        queries, keys = inputs()

        def case(turn: int) -> object:
            halves = queries[turn % 3].unflatten(-1, (2, -1))
            return torch.einsum("thsc,snc->sthn", halves, keys[:, 0]).topk(sizes.experts_per_head, dim=-1)

        return case

    def ours(backend: str) -> Case:
        check_backend(backend)
        queries, keys = inputs()
        return lambda turn: api.retrieve(queries[turn % 3], keys, sizes.experts_per_head, backend=backend)

    contenders: dict[str, Callable[[], Case]] = {"torch's scores and top-k alone": torch_alone}
    for backend in ("triton", "reference"):
        contenders[f"peerlm, {backend}"] = lambda backend=backend: ours(backend)
    shape = {"tokens": tokens, "heads": heads, "n": n, "k": sizes.experts_per_head}
    report.time("retrieval", contenders, **shape)


def _pairs(report: Report, dim: int, kind: str, tokens: int) -> tuple[Tensor, list[Tensor]]:
    """Experts (N, 2, D) in bfloat16 and ids in rotation, (T, P)."""
    sizes, device = report.sizes, report.device
    rows = torch.empty(sizes.num_experts, 2, dim, dtype=torch.bfloat16, device=device).normal_(std=dim**-0.5)
    shape = (tokens, sizes.per_token)
    return rows, [draw(shape, sizes.num_experts, device, kind) for _ in range(3)]


def _experts_forward(report: Report, dim: int, kind: str, tokens: int) -> None:
    sizes, device = report.sizes, report.device
    made = report.attempt(
        f"experts forward, {kind}: rows", lambda: _pairs(report, dim, kind, tokens), tokens=tokens, dim=dim
    )
    if made is None:
        return
    rows, ids = made
    x = torch.randn(tokens, dim, device=device).bfloat16()
    weights = torch.rand(tokens, sizes.per_token, device=device)

    def ceiling() -> Case:
        out = torch.empty(tokens, 2 * dim, device=device)
        return lambda turn: gather(rows.flatten(1), ids[turn % 3], out)

    def bag() -> Case:
        return lambda turn: F.embedding_bag(ids[turn % 3], rows.flatten(1), mode="sum")

    def ours(backend: str) -> Case:
        check_backend(backend)
        return lambda turn: api.mix_experts(x, weights, ids[turn % 3], rows, backend=backend)

    contenders: dict[str, Callable[[], Case]] = {"gather alone": ceiling}
    for backend in BACKENDS if tokens <= sizes.tokens else ("triton",):
        contenders[f"peerlm, {backend}"] = lambda backend=backend: ours(backend)
    contenders["nn.EmbeddingBag of the same rows"] = bag
    report.time(
        "experts forward",
        contenders,
        traffic=tokens * sizes.per_token * 4 * dim,
        tokens=tokens,
        per_token=sizes.per_token,
        dim=dim,
        ids=kind,
    )


def _experts_backward(report: Report, kind: str) -> None:
    """The backward pass alone, gradients of rows as sparse ones."""
    sizes, device = report.sizes, report.device
    made = report.attempt(f"experts backward, {kind}: rows", lambda: _pairs(report, sizes.dim, kind, sizes.tokens))
    if made is None:
        return
    rows, ids = made
    rows = nn.Parameter(rows)
    x = torch.randn(sizes.tokens, sizes.dim, device=device).bfloat16().requires_grad_()
    weights = torch.rand(sizes.tokens, sizes.per_token, device=device).requires_grad_()
    gradient = torch.randn(sizes.tokens, sizes.dim, device=device).bfloat16()

    def both(backend: str) -> Case:
        check_backend(backend)

        def case(turn: int) -> object:
            x.grad = weights.grad = rows.grad = None
            y = api.mix_experts(x, weights, ids[turn % 3], rows, backend=backend, row_gradients=True)
            return y.backward(gradient)

        return case

    contenders = {f"peerlm, {each}": lambda each=each: both(each) for each in ("triton", "reference")}
    shape = {"tokens": sizes.tokens, "per_token": sizes.per_token, "dim": sizes.dim, "ids": kind}
    report.time("experts forward and backward", contenders, **shape)


def _row_update(report: Report, dtype: torch.dtype) -> None:
    """One step of the row-sparse AdamW of the rows that a batch touches; the gradient is there already."""
    sizes, device = report.sizes, report.device
    count = sizes.num_experts // (dtype.itemsize // 2)  # so many that all contenders fit into memory together
    touched = min(count // 2, sizes.tokens * sizes.per_token)
    shape = (count, 2, sizes.dim)
    made = report.attempt("row update: gradient", lambda: torch.randn(touched, 2, sizes.dim, device=device))
    if made is None:
        return
    values = made
    ids = torch.randperm(count, device=device)[:touched].sort().values

    def ceiling() -> Case:
        flat = [torch.zeros(shape[0], 2 * sizes.dim, dtype=dtype, device=device) for _ in range(3)]
        return lambda turn: update(ids, values.flatten(1), *flat)

    def ours(**settings: object) -> Case:
        rows = nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
        optimizer = RowAdamW([{"params": [rows], "name": "table"}], lr=1e-4, state_dtype=dtype, **settings)
        wide = values.to(dtype)

        def case(turn: int) -> object:
            rows.grad = torch.sparse_coo_tensor(ids[None], wide, shape, is_coalesced=True, check_invariants=False)
            return optimizer.step()

        return case

    contenders: dict[str, Callable[[], Case]] = {
        "read and write alone": ceiling,
        "peerlm, lazy AdamW": lambda: ours(lazy=True),
    }
    if dtype == torch.float32:
        contenders["peerlm, exact AdamW"] = ours
    moved = touched * 2 * sizes.dim * (4 + 6 * dtype.itemsize)
    report.time(
        "row update", contenders, traffic=moved, num_rows=count, touched=touched, dim=sizes.dim, rows=str(dtype)[6:]
    )
