"""Whether retrieved ids are those of an exhaustive search in float64, on easy keys and on others, and at the edges."""

import math
from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch
from contenders import check_backend
from oracle import exhaustive_search
from report import Report, SkippedError
from torch import Tensor
from trained_keys import trained_keys

from peerlm.ops import api
from peerlm.ops.functions import WEIGHTINGS
from peerlm.ops.pairing import PAIRINGS

Facts = dict[str, object]
SAME = {"triton": 1e-14, "reference": 1e-5}
"""By how much, relatively, scores may differ that are ordered otherwise than by the search. Sums
in another order differ by some 1e-15. The definition computes in float32; that it passes shows that the checks hold."""


def run(report: Report, backend: str) -> None:
    """Ids against an exhaustive search, on the keys that are easy and those that are not; then the edges."""
    sizes = report.sizes
    n = math.isqrt(sizes.num_experts)
    shape = (sizes.checked_tokens, sizes.heads, n, sizes.key_dim // 2)
    makers = {**KEYS, "trained keys": partial(trained_keys, steps=sizes.trained_steps)}
    for name, make in makers.items():
        for dtype in (torch.bfloat16, torch.float32):
            label = f"{backend}, ids, {name}, {str(dtype)[6:]}"
            report.check(label, lambda make=make, dtype=dtype: _ids(report, backend, make, dtype, shape, 16))
    if backend == "triton":
        for name, make in makers.items():
            report.check(f"triton, share searched whole, {name}", lambda make=make: _share_missed(report, make))
    for name, k, side, tokens in (
        ("many experts", sizes.large_k, n, 4),
        ("many sub-keys", sizes.experts_per_head, sizes.large_n, 2),
        ("one token", sizes.experts_per_head, n, 1),
        ("no token", sizes.experts_per_head, n, 0),
        ("one expert", 1, n, 4),
    ):
        edge = (tokens, 1, side, sizes.key_dim // 2)
        report.check(
            f"{backend}, ids, {name}",
            lambda edge=edge, k=k: _ids(report, backend, normal_keys, torch.bfloat16, edge, k),
            k=k,
            n=side,
            tokens=tokens,
        )
    for name, value in (("NaN", math.nan), ("inf", math.inf)):
        report.check(f"{backend}, a query of {name}", lambda value=value: _odd_query(report, backend, value, shape))
    for weighting, pairing in (("sigmoid", "shells"), ("relu", "shells"), ("none", "row-major")):
        report.check(
            f"{backend}, ids, {weighting}, {pairing}",
            lambda w=weighting, p=pairing: _ids(report, backend, normal_keys, torch.bfloat16, shape, 16, w, p),
        )
    report.check(f"{backend}, retrieval, same bits twice and in half a batch", lambda: _same_ids(report, backend))


def normal_keys(tokens: int, heads: int, n: int, half: int) -> tuple[Tensor, Tensor]:
    """Keys as at the start, shared by all heads."""
    return torch.randn(tokens, heads, 2 * half), (2 * torch.rand(2, 1, n, half) - 1) * half**-0.5


def keys_per_head(tokens: int, heads: int, n: int, half: int) -> tuple[Tensor, Tensor]:
    """A set of sub-keys for each head."""
    return torch.randn(tokens, heads, 2 * half), (2 * torch.rand(2, heads, n, half) - 1) * half**-0.5


def clustered_keys(tokens: int, heads: int, n: int, half: int) -> tuple[Tensor, Tensor]:
    """As after training: few clusters, whose sub-keys differ by a thousandth, and queries beside their centres."""
    centres = torch.randn(2, max(2, n // 64), half)
    which = torch.randint(centres.shape[1], (2, n))
    keys = torch.stack([centres[s, which[s]] for s in (0, 1)])
    keys = keys * (1 + 0.2 * torch.rand(2, n, 1)) + 1e-3 * torch.randn(2, n, half)
    chosen = torch.randint(centres.shape[1], (tokens, heads, 2))
    query = torch.stack([centres[s, chosen[..., s]] for s in (0, 1)], dim=-2)
    return (query + 0.3 * torch.randn_like(query)).flatten(-2), keys[:, None]


def equal_keys(tokens: int, heads: int, n: int, half: int) -> tuple[Tensor, Tensor]:
    """Each sub-key four times, so that most places are ties."""
    query, keys = normal_keys(tokens, heads, -(-n // 4), half)
    return query, keys.repeat(1, 1, 4, 1)[:, :, :n]


def zero_queries(tokens: int, heads: int, n: int, half: int) -> tuple[Tensor, Tensor]:
    """All experts tie: the lowest ids win."""
    query, keys = normal_keys(tokens, heads, n, half)
    return query * 0, keys


KEYS: dict[str, Callable[[int, int, int, int], tuple[Tensor, Tensor]]] = {
    "normal keys": normal_keys,
    "keys per head": keys_per_head,
    "clustered keys": clustered_keys,
    "equal keys": equal_keys,
    "zero queries": zero_queries,
}


def _ids(
    report: Report,
    backend: str,
    make: Callable[[int, int, int, int], tuple[Tensor, Tensor]],
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    k: int,
    weighting: str = "softmax",
    pairing: str = "row-major",
) -> Facts:
    check_backend(backend)
    with torch.device(report.device):
        query, keys = (each.to(dtype) for each in make(*shape))
    k = min(k, shape[2])
    weights, found = api.retrieve(query, keys, k, weighting=weighting, pairing=pairing, backend=backend)
    ids, scores = exhaustive_search(query, keys, k, pairing)
    facts = _compared(found, ids, scores, query, keys, SAME[backend], pairing)
    wide = WEIGHTINGS[weighting](scores)
    error = (weights.double() - wide).abs().max().item() if wide.numel() else 0.0
    facts["weight_error"] = float(f"{error:.3g}")
    facts["ok"] = bool(facts["ok"]) and error < 1e-4
    return facts


def _compared(
    found: Tensor, ids: Tensor, scores: Tensor, query: Tensor, keys: Tensor, same: float, pairing: str
) -> Facts:
    """Whether ids are those of the search, but where scores differ by rounding."""
    different = found != ids
    if not different.any():
        return {"ok": True, "mismatches": 0}
    n = keys.shape[2]
    token, head, place = different.nonzero(as_tuple=True)
    got = found[token, head, place]
    q = query.double().unflatten(-1, (2, -1))[token, head]
    own = head % keys.shape[1]
    i, j = PAIRINGS[pairing].sub_keys(got, n)
    score = (q[:, 0] * keys[0, own, i].double()).sum(-1) + (q[:, 1] * keys[1, own, j].double()).sum(-1)
    gap = (score - scores[token, head, place]).abs() / scores[token, head].abs().amax(-1).clamp(min=1e-300)
    wrong = int((gap > same).sum())
    return {"ok": wrong == 0, "mismatches": int(different.sum()), "wrong": wrong, "largest_gap": gap.max().item()}


def _share_missed(report: Report, make: Callable[[int, int, int, int], tuple[Tensor, Tensor]]) -> Facts:
    """The share of searches of sub-keys for which a shortlist was not certain, so that all were scored."""
    check_backend("triton")
    sizes = report.sizes
    count = getattr(import_module("peerlm.ops.triton.retrieval"), "num_missed", None)
    if count is None:
        raise SkippedError("the kernels do not count them")
    with torch.device(report.device):
        query, keys = make(sizes.tokens, sizes.heads, math.isqrt(sizes.num_experts), sizes.key_dim // 2)
    missed = count(query.bfloat16().float(), keys.bfloat16().float().contiguous(), sizes.experts_per_head)
    if missed is None:
        raise SkippedError("no shortlists at this size")
    share = missed.item() / (2 * query.shape[0] * query.shape[1])
    return {"ok": True, "share": round(share, 5), "tokens": sizes.tokens}


def _odd_query(report: Report, backend: str, value: float, shape: tuple[int, int, int, int]) -> Facts:
    """One token is not finite: its neighbours' ids are those without it, and its own are within the table."""
    check_backend(backend)
    with torch.device(report.device):
        query, keys = normal_keys(*shape)
    k = min(report.sizes.experts_per_head, shape[2])
    _, clean = api.retrieve(query, keys, k, backend=backend)
    query[1] = value
    try:
        _, found = api.retrieve(query, keys, k, backend=backend)
    except ValueError as error:
        return {"ok": True, "refused": str(error)[:120]}
    others = torch.arange(len(query), device=query.device) != 1
    inside = bool(((found >= 0) & (found < shape[2] ** 2)).all())
    return {"ok": inside and torch.equal(found[others], clean[others]), "inside": inside}


def _same_ids(report: Report, backend: str) -> Facts:
    check_backend(backend)
    sizes = report.sizes
    n = math.isqrt(sizes.num_experts)
    with torch.device(report.device):
        query, keys = (each.bfloat16() for each in normal_keys(sizes.tokens, sizes.heads, n, sizes.key_dim // 2))
    weights, ids = api.retrieve(query, keys, sizes.experts_per_head, backend=backend)
    again, same = api.retrieve(query, keys, sizes.experts_per_head, backend=backend)
    part = sizes.tokens // 2 + 1
    weights_of_part, ids_of_part = api.retrieve(query[:part], keys, sizes.experts_per_head, backend=backend)
    twice = torch.equal(ids, same) and torch.equal(weights, again)
    alone = torch.equal(ids[:part], ids_of_part) and torch.equal(weights[:part], weights_of_part)
    return {"ok": twice and (alone or backend == "reference"), "twice": twice, "in_half_a_batch": alone}
