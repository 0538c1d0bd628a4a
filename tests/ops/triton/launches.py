"""Which kernels are launched, and with what: operators are called at real shapes, and no kernel runs.

python tests/ops/triton/launches.py FILE all|suite|WORKLOAD

In Triton's interpreter a launch is a Python call, which is recorded here: the kernel's name, dtypes, alignments,
constants and options. `compiled.py` compiles what is recorded as a launch on a GPU would. Widths, heads and sub-keys
are those in use; tokens and rows are few, since launches do not depend on how many there are.
"""

# ruff: noqa: E402, Triton asks for its interpreter when it is imported

import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

ROOT = Path(__file__).parents[3]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks/gpu")]

import moves

from peerlm.layers import ExpertTable
from peerlm.ops import api
from peerlm.ops.functions import ACTIVATIONS
from peerlm.ops.row_updates import prepare_rows
from peerlm.optim import RowAdamW

TOKENS = 64
ROWS = 1008
"""Of each table, a multiple of 16 as in use; nothing else has as many."""
MANY_TOKENS = 4096
"""Where kernels are chosen by the number of tokens."""


def ceilings() -> None:
    """The kernels of `benchmarks/gpu` that only move memory."""
    for dtype in (torch.bfloat16, torch.float32):
        for width in (512, 2048):
            rows = torch.zeros(ROWS, width, dtype=dtype)
            moves.gather(rows, torch.zeros(TOKENS, 128, dtype=torch.int64), torch.zeros(TOKENS, width))
            ids = torch.zeros(TOKENS, dtype=torch.int64)
            moves.update(ids, torch.zeros(TOKENS, width), *(torch.zeros_like(rows) for _ in range(3)))


def retrieval(
    *, dtype: torch.dtype, heads: int = 8, sets: int = 1, n: int = 1024, k: int = 16, half: int = 64, **names: str
) -> None:
    """Forward and backward, of few tokens and of many."""
    for tokens in (TOKENS, MANY_TOKENS):
        query = torch.zeros(tokens, heads, 2 * half, dtype=dtype, requires_grad=True)
        keys = torch.zeros(2, sets, n, half, dtype=dtype, requires_grad=True)
        weights, _ = api.retrieve(query, keys, k, backend="triton", **names)
        weights.sum().backward()


def experts(
    *, dtype: torch.dtype, x_dtype: torch.dtype | None = None, dim: int = 1024, parts: int = 2, activation: str = "gelu"
) -> None:
    """Forward and backward, with sparse and with dense gradients of rows, in evaluation, of few tokens and of many."""
    rows, trained = torch.zeros(ROWS, parts, dim, dtype=dtype), dtype.itemsize > 1
    scales = None if trained else torch.zeros(ROWS, parts)
    for tokens in (TOKENS, MANY_TOKENS):
        x = torch.zeros(tokens, dim, dtype=x_dtype or (dtype if trained else torch.bfloat16))
        weights, ids = torch.zeros(tokens, 128), torch.zeros(tokens, 128, dtype=torch.int64)
        api.mix_experts(x, weights, ids, rows, scales, activation=activation, backend="triton")
        for row_gradients in (True, False) if trained else (False,):
            leaves = [x, weights, rows] if trained else [x, weights]
            for leaf in leaves:
                leaf.requires_grad_().grad = None
            y = api.mix_experts(
                x, weights, ids, rows, scales, activation=activation, backend="triton", row_gradients=row_gradients
            )
            y.sum().backward()
            if trained:
                rows.requires_grad_(False)


def values(*, dtype: torch.dtype, dim: int = 1024) -> None:
    """The two operators of single vectors, forward and backward."""
    rows = torch.zeros(ROWS, dim, dtype=dtype, requires_grad=True)
    weights, ids = torch.zeros(TOKENS, 128), torch.zeros(TOKENS, 128, dtype=torch.int64)
    api.mix_values(weights.requires_grad_(), ids, rows, backend="triton", row_gradients=True).sum().backward()
    x = torch.zeros(TOKENS, dim, dtype=dtype, requires_grad=True)
    api.dot_values(x, ids, rows, backend="triton", row_gradients=True).sum().backward()


def updates(*, dtype: torch.dtype, dim: int = 1024, **settings: Any) -> None:
    """Steps of the optimizer by rows; rows that are read late catch up. Fused ones are taken by the backward pass."""
    _take_the_kernels_of_steps()
    rows = torch.nn.Parameter(torch.zeros(ROWS, 2, dim, dtype=dtype))
    optimizer = RowAdamW([{"params": [rows], "name": "table"}], lr=1e-3, **settings)
    if settings.get("fused"):
        x, weights = torch.zeros(TOKENS, dim, dtype=dtype), torch.zeros(TOKENS, 128)
        ids = torch.zeros(TOKENS, 128, dtype=torch.int64)
        for _ in range(2):
            prepare_rows(rows, ids)
            y = api.mix_experts(x, weights, ids, rows, backend="triton", row_gradients=True)
            y.sum().backward()
            optimizer.step()
        return
    for step in range(3):
        ids = torch.arange(TOKENS) + step
        prepare_rows(rows, ids)
        gradient = torch.zeros(TOKENS, 2, dim, dtype=dtype)
        rows.grad = torch.sparse_coo_tensor(ids[None], gradient, rows.shape, is_coalesced=True, check_invariants=False)
        optimizer.step()


def _take_the_kernels_of_steps() -> None:
    row_steps = importlib.import_module("peerlm.ops.triton.row_steps")
    api.row_kernels = lambda table: row_steps  # on a CPU the native ones come first


def scaled_updates(*, row_format: str, dim: int = 1024, gated: bool = False, **settings: Any) -> None:
    """Steps of rows of 8 bits, which the backward pass takes; stale ones decay."""
    _take_the_kernels_of_steps()
    table = ExpertTable(ROWS, dim, row_format=row_format, gated=gated, backend="triton")
    table.train_in_place()
    options = {"betas": (0.0, 0.95), "row_wise": True, **settings}
    optimizer = RowAdamW([{"params": table.row_parameters(), "name": "table"}], lr=1e-3, fused=True, **options)
    for _ in range(2):
        ids = torch.zeros(TOKENS, 128, dtype=torch.int64)
        table.mix(torch.zeros(TOKENS, 128), ids, torch.zeros(TOKENS, dim, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()


BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
Workload = Callable[[], None]
WORKLOADS: dict[str, Workload] = {"ceilings": ceilings}
"""By name. Those of `IN_THE_SUITE` first."""
IN_THE_SUITE = ["ceilings"]

if "triton" in api.BACKENDS:
    WORKLOADS |= {
        "retrieval": partial(retrieval, dtype=BFLOAT16),
        "experts": partial(experts, dtype=BFLOAT16),
        "updates": partial(updates, dtype=BFLOAT16, lazy=True),
        "exact updates": partial(updates, dtype=FLOAT32),
        "fused updates": partial(updates, dtype=BFLOAT16, lazy=True, fused=True),
        "updates, int8": partial(scaled_updates, row_format="int8"),
    }
    IN_THE_SUITE = list(WORKLOADS)
    WORKLOADS |= {
        "retrieval, float32": partial(retrieval, dtype=FLOAT32),
        "retrieval, one head": partial(retrieval, dtype=BFLOAT16, heads=1),
        "retrieval, keys per head": partial(retrieval, dtype=BFLOAT16, sets=8),
        "retrieval, k = 64, narrow keys": partial(retrieval, dtype=FLOAT32, heads=1, n=256, k=64, half=16),
        "retrieval, k = 8": partial(retrieval, dtype=BFLOAT16, k=8),
        "retrieval, 4096 sub-keys": partial(retrieval, dtype=BFLOAT16, n=4096),
        "retrieval, wide keys": partial(retrieval, dtype=BFLOAT16, half=128),
        "retrieval, k = 64": partial(retrieval, dtype=BFLOAT16, k=64),
        "retrieval, wide keys, k = 64": partial(retrieval, dtype=BFLOAT16, k=64, half=128),
        **{
            f"retrieval, {weighting}, shells": partial(retrieval, dtype=BFLOAT16, weighting=weighting, pairing="shells")
            for weighting in ("softmax", "sigmoid", "relu", "none")
        },
        "experts, float32": partial(experts, dtype=FLOAT32),
        "experts, float32 rows, bfloat16 tokens": partial(experts, dtype=FLOAT32, x_dtype=BFLOAT16),
        "experts, int8": partial(experts, dtype=torch.int8),
        "experts, float8": partial(experts, dtype=torch.float8_e4m3fn),
        "experts, gated": partial(experts, dtype=BFLOAT16, parts=3),
        "experts, width 256": partial(experts, dtype=BFLOAT16, dim=256),
        "experts, width 512": partial(experts, dtype=FLOAT32, dim=512),
        "experts, bfloat16, width 512": partial(experts, dtype=BFLOAT16, dim=512),
        "experts, width 2048": partial(experts, dtype=BFLOAT16, dim=2048),
        **{f"experts, {name}": partial(experts, dtype=BFLOAT16, activation=name) for name in ACTIVATIONS},
        "values": partial(values, dtype=BFLOAT16),
        "values, float32": partial(values, dtype=FLOAT32),
        "updates, bfloat16 moments": partial(updates, dtype=BFLOAT16, lazy=True, state_dtype=BFLOAT16),
        "updates, row-wise": partial(updates, dtype=BFLOAT16, lazy=True, row_wise=True),
        "updates, fused, exact": partial(updates, dtype=FLOAT32, fused=True),
        "updates, fused, row-wise": partial(updates, dtype=BFLOAT16, lazy=True, row_wise=True, fused=True),
        "updates, fused, row-wise, no first moment": partial(
            updates, dtype=BFLOAT16, lazy=True, row_wise=True, fused=True, betas=(0.0, 0.95)
        ),
        "updates, no first moment": partial(updates, dtype=FLOAT32, betas=(0.0, 0.95)),
        "updates, width 256": partial(updates, dtype=BFLOAT16, dim=256, lazy=True),
        "updates, float8": partial(scaled_updates, row_format="float8_e4m3fn"),
        "updates, int8, gated, width 256": partial(scaled_updates, row_format="int8", dim=256, gated=True),
        "updates, int8, a moment for each weight": partial(
            scaled_updates, row_format="int8", lazy=True, betas=(0.9, 0.95), row_wise=False
        ),
    }


def record(workloads: list[str]) -> dict[str, Any]:
    """The distinct launches of workloads, by the names of `WORKLOADS`, and the workloads that failed, with why."""
    found: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launch = described(kernel.fn, arguments, options)
        found.setdefault(json.dumps(launch, sort_keys=True), launch | {"workload": name})

    retrieval_module = importlib.import_module("peerlm.ops.triton.retrieval")
    retrieval_module.INTERPRETED = False  # as on a GPU, where products are of bfloat16
    with _launches_go_to(run):
        for name in workloads:
            try:
                WORKLOADS[name]()
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return {"launches": list(found.values()), "failed": failed}


@contextmanager
def _launches_go_to(run: Callable[..., None]) -> Iterator[None]:
    """No kernel runs: what it would have written is zero."""
    places = [(InterpretedFunction, "run", run)]
    places += [(torch, "empty", torch.zeros), (torch, "empty_like", torch.zeros_like)]
    places += [(Tensor, "new_empty", Tensor.new_zeros)]
    before = [getattr(owner, name) for owner, name, _ in places]
    for owner, name, other in places:
        setattr(owner, name, other)
    try:
        yield
    finally:
        for (owner, name, _), original in zip(places, before, strict=True):
            setattr(owner, name, original)


def described(function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """One launch in plain values."""
    signature = inspect.signature(function)
    own = {name: value for name, value in options.items() if name in signature.parameters}
    bound = signature.bind(*arguments, **own)
    bound.apply_defaults()
    return {
        "module": function.__module__,
        "kernel": function.__qualname__,
        "arguments": {name: _argument(value) for name, value in bound.arguments.items()},
        "options": {name: value for name, value in options.items() if name not in own},
    }


def _argument(value: Any) -> dict[str, Any]:
    if isinstance(value, Tensor):
        table = value.shape[:1] == (ROWS,) and value.ndim > 1
        return {
            "tensor": str(value.dtype).removeprefix("torch."),
            "aligned": value.data_ptr() % 16 == 0,
            "row_bytes": value.stride(0) * value.element_size() if table else 0,
        }
    if isinstance(value, InterpretedFunction):
        return {"function": [value.fn.__module__, value.fn.__qualname__]}
    if isinstance(value, tl.dtype):
        return {"dtype": value.name}
    if isinstance(value, tl.constexpr):
        return _argument(value.value)
    return {"value": value}


if __name__ == "__main__":
    file, which = sys.argv[1:]
    names = {"all": list(WORKLOADS), "suite": IN_THE_SUITE}.get(which, [which])
    Path(file).write_text(json.dumps(record(names), indent=1), encoding="utf-8")
