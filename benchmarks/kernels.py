"""The kernels against PyTorch and the limits of memory: retrieval, expert mixing, row formats. Markdown and JSON.

Correctness first; one process, cases interleaved, medians. The gather ceiling is a loop that only reads the same rows.

    python benchmarks/kernels.py [--num-experts 1048576] [--dim 256] [--tokens 2048] [--zipf] [--json FILE]
"""

# ruff: noqa: T201, tables on the terminal are what this is for

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from ceilings import Ceilings
from measure import interleave, report
from torch import Tensor

from peerlm.layers.row_memory import empty_rows
from peerlm.ops import api, reference
from peerlm.ops.cpu import native
from peerlm.ops.row_formats import quantise
from peerlm.ops.scoring import half_scores

HEADS, EXPERTS_PER_HEAD, HALF_KEY = 8, 16, 128


def draw_ids(tokens: int, num_experts: int, *, zipf: bool) -> Tensor:
    """Ids (tokens, heads * k), uniform or with frequencies like 1 / rank over a random order of experts."""
    shape = (tokens, HEADS * EXPERTS_PER_HEAD)
    if not zipf:
        return torch.randint(0, num_experts, shape)
    ranks = num_experts ** torch.rand(shape, dtype=torch.float64)  # P(rank < r) = log r / log N
    return torch.randperm(num_experts)[(ranks.long() - 1).clamp(0, num_experts - 1)]


def scored_in(dtype: str, query: Tensor, sub_keys: Tensor) -> tuple[Tensor, Tensor]:
    """Native retrieval with the approximate scores in "fp32" or "bf16"."""
    os.environ["PEERLM_SCORES"] = dtype
    try:
        return api.retrieve(query, sub_keys, EXPERTS_PER_HEAD, backend="cpu")
    finally:
        del os.environ["PEERLM_SCORES"]


def torch_top_k(query: Tensor, sub_keys: Tensor) -> None:
    """What PyTorch needs for the two half scores and their top-k alone."""
    half_scores(query, sub_keys).topk(EXPERTS_PER_HEAD)


def retrieval_cases(options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Scores, top-k, pairs, weights; checked against an exhaustive search in float64."""
    n = math.isqrt(options.num_experts)
    query = torch.randn(options.tokens, HEADS, 2 * HALF_KEY)
    sub_keys = (2 * torch.rand(2, 1, n, HALF_KEY) - 1) * HALF_KEY**-0.5
    _, exact = reference.retrieve(query[:64].double(), sub_keys.double(), EXPERTS_PER_HEAD, "softmax")
    cases: dict[str, Callable[[], object]] = {}
    for dtype in ("fp32", "bf16", "int8"):
        if not native.module.has_scores(dtype):
            continue
        assert torch.equal(scored_in(dtype, query[:64], sub_keys)[1], exact)
        cases[f"retrieval, {dtype} scores"] = lambda dtype=dtype: scored_in(dtype, query, sub_keys)
    cases["torch, scores and top-k alone"] = lambda: torch_top_k(query, sub_keys)
    cases["reference retrieval"] = lambda: reference.retrieve(query, sub_keys, EXPERTS_PER_HEAD, "softmax")
    return cases


def mixing_cases(options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Forward of the experts in each row format, beside a loop that only reads their rows."""
    shape = (options.num_experts, 2, options.dim)
    x, weights = torch.randn(options.tokens, options.dim), torch.rand(options.tokens, HEADS * EXPERTS_PER_HEAD)
    ids = draw_ids(options.tokens, options.num_experts, zipf=options.zipf)
    rows = empty_rows(*shape).normal_(std=options.dim**-0.5)
    half = empty_rows(*shape, dtype=torch.bfloat16).copy_(rows)
    eighth = empty_rows(*shape, dtype=torch.int8)
    scales = torch.empty(shape[:2])
    for part in torch.arange(options.num_experts).split(1 << 16):
        eighth[part], scales[part] = quantise(rows[part])
    formats = {"float32": (rows, None), "bfloat16": (half, None), "int8": (eighth, scales)}
    few = torch.arange(8 * ids.shape[1]).view(8, -1)  # float64 copies of the first tokens' rows alone
    exact = reference.mix_experts(x[:8].double(), weights[:8], few, rows[ids[:8].flatten()].double(), None, "gelu")
    cases: dict[str, Callable[[], object]] = {}
    for name, (table, scale) in formats.items():
        found = api.mix_experts(x[:8], weights[:8], ids[:8], table, scale, backend="cpu")
        error = ((found - exact).norm() / exact.norm()).item()
        print(f"mixing {name}: relative error {error:.1e}")
        assert error < {"float32": 1e-6, "bfloat16": 3e-3, "int8": 1.3e-2}[name]
        cases[f"mixing, {name}"] = lambda table=table, scale=scale: api.mix_experts(
            x, weights, ids, table, scale, backend="cpu"
        )
    ceilings = Ceilings()
    cases["gather ceiling, float32 rows"] = lambda: ceilings.gather(rows.view(options.num_experts, -1), ids)
    cases["sequential read of 1 GiB"] = lambda: ceilings.read(rows.view(-1)[: 1 << 28])
    cases["bag, float32"] = lambda: api.mix_experts(x, weights, ids, rows, backend="bag")
    return cases


def main() -> None:
    """Parse, check, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-experts", type=int, default=1024**2)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--zipf", action="store_true", help="few experts take most tokens")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="file that a row for each figure is added to")
    options = parser.parse_args()
    torch.manual_seed(0)
    sizes = {key: getattr(options, key) for key in ("num_experts", "dim", "tokens")}
    sizes["routing"] = "zipf" if options.zipf else "uniform"
    for cases in (retrieval_cases, mixing_cases):
        report("kernels ms", interleave(cases(options), rounds=options.rounds), sizes, options.json)


if __name__ == "__main__":
    main()
