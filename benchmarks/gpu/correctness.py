"""Whether our operators are right on this card: ids of an exhaustive search, float64 errors, edges, equal bits."""

import math
from collections.abc import Callable

import torch
from contenders import check_backend
from moves import draw
from oracle import exhaustive_search
from report import Report, SkippedError
from torch import Tensor

from peerlm.ops import api
from peerlm.ops.functions import ACTIVATIONS
from peerlm.testing import assert_within_budget

Facts = dict[str, object]
SAME = {"triton": 1e-14, "reference": 1e-5}
"""What is checked, and by how much, relatively, scores may differ that are ordered otherwise than by the search. Sums
in another order differ by some 1e-15. The definition computes in float32; that it passes shows that the checks hold."""


def run(report: Report) -> None:
    """All checks, each one row."""
    for backend in SAME:
        retrieval_checks(report, backend)
        mixing_checks(report, backend)


# --- retrieval ---


def retrieval_checks(report: Report, backend: str) -> None:
    """Ids against an exhaustive search, on the keys that are easy and those that are not; then the edges."""
    sizes = report.sizes
    n = math.isqrt(sizes.num_experts)
    shape = (sizes.checked_tokens, sizes.heads, n, sizes.key_dim // 2)
    for name, make in KEYS.items():
        for dtype in (torch.bfloat16, torch.float32):
            label = f"{backend}, ids, {name}, {str(dtype)[6:]}"
            report.check(label, lambda make=make, dtype=dtype: _ids(report, backend, make, dtype, shape, 16))
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
) -> Facts:
    check_backend(backend)
    with torch.device(report.device):
        query, keys = (each.to(dtype) for each in make(*shape))
    k = min(k, shape[2])
    weights, found = api.retrieve(query, keys, k, backend=backend)
    ids, scores = exhaustive_search(query, keys, k)
    facts = _compared(found, ids, scores, query, keys, SAME[backend])
    wide = scores.softmax(-1)
    error = (weights.double() - wide).abs().max().item() if wide.numel() else 0.0
    facts["weight_error"] = float(f"{error:.3g}")
    facts["ok"] = bool(facts["ok"]) and error < 1e-4
    return facts | _fallback(backend)


def _compared(found: Tensor, ids: Tensor, scores: Tensor, query: Tensor, keys: Tensor, same: float) -> Facts:
    """Whether ids are those of the search, but where scores differ by rounding."""
    different = found != ids
    if not different.any():
        return {"ok": True, "mismatches": 0}
    n = keys.shape[2]
    token, head, place = different.nonzero(as_tuple=True)
    got = found[token, head, place]
    q = query.double().unflatten(-1, (2, -1))[token, head]
    own = head % keys.shape[1]
    score = (q[:, 0] * keys[0, own, got // n].double()).sum(-1) + (q[:, 1] * keys[1, own, got % n].double()).sum(-1)
    gap = (score - scores[token, head, place]).abs() / scores[token, head].abs().amax(-1).clamp(min=1e-300)
    wrong = int((gap > same).sum())
    return {"ok": wrong == 0, "mismatches": int(different.sum()), "wrong": wrong, "largest_gap": gap.max().item()}


def _fallback(backend: str) -> Facts:
    """The share of rows that were searched whole, where the backend says it."""
    if backend != "triton":
        return {}
    from importlib import import_module

    module = import_module(api._BACKENDS[backend][0])
    says = getattr(module, "share_searched_whole", None)
    return {} if says is None else {"share": float(says())}


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


# --- experts ---


def mixing_checks(report: Report, backend: str) -> None:
    """Errors against float64, bits, offsets beyond 2^31."""
    for activation in ACTIVATIONS:
        for gated in (False, True):
            label = f"{backend}, experts, {activation}{', gated' if gated else ''}"
            report.check(label, lambda a=activation, g=gated: _errors(report, backend, torch.bfloat16, a, g))
    for dtype in (torch.float32, torch.int8):
        label = f"{backend}, experts, {str(dtype)[6:]} rows"
        report.check(label, lambda dtype=dtype: _errors(report, backend, dtype, "gelu", False))
    for kind in ("uniform", "zipf", "one expert"):
        report.check(
            f"{backend}, experts, same bits twice, {kind}", lambda kind=kind: _same_bits(report, backend, kind)
        )
    report.check(f"{backend}, experts beyond 2^31 numbers", lambda: _large_offsets(report, backend))
    report.check(f"{backend}, experts of no token", lambda: _no_token(report, backend))


def _inputs(report: Report, dtype: torch.dtype, gated: bool, tokens: int = 64) -> list[Tensor | None]:
    sizes, device = report.sizes, report.device
    count = 2048 if report.device == "cuda" else 32
    parts = 3 if gated else 2
    wide = torch.randn(count, parts, sizes.dim, device=device) * sizes.dim**-0.5
    rows, scales = wide.to(dtype), None
    if dtype == torch.int8:
        scales = wide.abs().amax(-1) / 127
        rows = (wide / scales[..., None]).round().to(torch.int8)
    x = torch.randn(tokens, sizes.dim, device=device).to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    weights = torch.rand(tokens, sizes.per_token, device=device)
    ids = torch.randint(count, (tokens, sizes.per_token), device=device)
    return [x, weights, ids, rows, scales]


def _mixed(
    inputs: list[Tensor | None], activation: str, backend: str, *, wide: bool = False, row_gradients: bool = False
) -> dict[str, Tensor]:
    """Output and gradients, in float64 with `wide`."""
    leaves = []
    for each in inputs:
        if each is not None and each.is_floating_point():
            each = (each.double() if wide else each).detach().requires_grad_()
        leaves.append(each)
    x, weights, ids, rows, scales = leaves
    if wide and scales is not None:
        rows, scales = rows.double() * scales.detach()[..., None], None
    if scales is not None:
        scales = scales.detach()
    out = api.mix_experts(
        x, weights, ids, rows, scales, activation=activation, backend=backend, row_gradients=row_gradients
    )
    direction = torch.linspace(-1, 1, max(1, out.numel()), device=out.device).bfloat16()[: out.numel()].view_as(out)
    out.backward(direction.to(out.dtype))
    found = {"y": out.detach(), "x": x.grad, "weights": weights.grad}
    if rows.grad is not None:
        found["rows"] = rows.grad.to_dense()
    return found


def _errors(report: Report, backend: str, dtype: torch.dtype, activation: str, gated: bool) -> Facts:
    check_backend(backend)
    inputs = _inputs(report, dtype, gated)
    actual = _mixed(inputs, activation, backend, row_gradients=dtype != torch.int8)
    plain, exact = (_mixed(inputs, activation, "reference", wide=wide) for wide in (False, True))
    error = max(((actual[name].double() - exact[name]).norm() / exact[name].norm()).item() for name in exact)
    try:
        assert_within_budget(actual, plain, exact)
    except AssertionError as over:
        return {"ok": False, "error": float(f"{error:.3g}"), "over_budget": str(over)[:160]}
    return {"ok": True, "error": float(f"{error:.3g}")}


def _same_bits(report: Report, backend: str, kind: str) -> Facts:
    """Output and gradients, also of rows that many tokens share."""
    check_backend(backend)
    sizes = report.sizes
    inputs = _inputs(report, torch.bfloat16, False, tokens=min(sizes.tokens, 2048))
    rows = inputs[3]
    assert rows is not None
    shape = (min(sizes.tokens, 2048), sizes.per_token)
    ids = torch.zeros(shape, dtype=torch.int64, device=report.device)
    inputs[2] = ids if kind == "one expert" else draw(shape, len(rows), report.device, kind)
    first, second = (_mixed(inputs, "gelu", backend, row_gradients=True) for _ in range(2))
    different = [name for name in first if not torch.equal(first[name], second[name])]
    return {"ok": not different or backend == "reference", "different": different}


def _large_offsets(report: Report, backend: str) -> Facts:
    """The last rows of a table of more than 2^31 numbers against the same rows in a small one."""
    check_backend(backend)
    sizes = report.sizes
    count = sizes.over_2_31
    if not count:
        raise SkippedError("needs a GPU with 12 GiB")
    rows = torch.zeros(count, 2, sizes.dim, dtype=torch.bfloat16, device=report.device)
    last = rows[-64:].normal_(std=sizes.dim**-0.5)
    x = torch.randn(64, sizes.dim, device=report.device).bfloat16()
    weights = torch.rand(64, sizes.per_token, device=report.device)
    ids = torch.randint(64, weights.shape, device=report.device)
    found = _mixed([x, weights, ids + count - 64, rows, None], "gelu", backend, row_gradients=True)
    there = _mixed([x, weights, ids, last.clone(), None], "gelu", backend, row_gradients=True)
    found["rows"] = found["rows"][-64:]
    if backend == "reference":  # adds in any order
        same = {name: bool(torch.allclose(found[name], there[name], rtol=0.1, atol=1e-3)) for name in there}
    else:
        same = {name: torch.equal(found[name], there[name]) for name in there}
    return {"ok": all(same.values()), "numbers": rows.numel(), **{f"same_{name}": is_ for name, is_ in same.items()}}


def _no_token(report: Report, backend: str) -> Facts:
    check_backend(backend)
    found = _mixed(_inputs(report, torch.bfloat16, False, tokens=0), "gelu", backend, row_gradients=True)
    return {"ok": found["y"].shape == (0, report.sizes.dim) and not found["rows"].any()}
