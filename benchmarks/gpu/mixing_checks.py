"""Whether sums of experts and their gradients are right: errors against float64, equal bits, large offsets."""

import torch
from contenders import check_backend
from moves import draw
from report import Report, SkippedError
from torch import Tensor

from peerlm.ops import api
from peerlm.ops.functions import ACTIVATIONS
from peerlm.ops.row_formats import EIGHT_BIT_DTYPES, SCALED_DTYPES, quantise, widened
from peerlm.testing import assert_within_budget

Facts = dict[str, object]


def run(report: Report, backend: str) -> None:
    """Errors against float64, bits, offsets beyond 2^31."""
    for activation in report.sizes.activations or ACTIVATIONS:
        for gated in (False, True):
            label = f"{backend}, experts, {activation}{', gated' if gated else ''}"
            report.check(label, lambda a=activation, g=gated: _errors(report, backend, torch.bfloat16, a, g))
    for dtype in (torch.float32, *EIGHT_BIT_DTYPES):
        label = f"{backend}, experts, {str(dtype)[6:]} rows"
        report.check(label, lambda dtype=dtype: _errors(report, backend, dtype, "gelu", False))
    for kind in ("uniform", "zipf", "one expert"):
        report.check(
            f"{backend}, experts, same bits twice, {kind}", lambda kind=kind: _same_bits(report, backend, kind)
        )
    report.check(f"{backend}, experts beyond 2^31 numbers", lambda: _large_offsets(report, backend))
    report.check(f"{backend}, experts of no token", lambda: _no_token(report, backend))


def _inputs(report: Report, dtype: torch.dtype, gated: bool, tokens: int | None = None) -> list[Tensor | None]:
    sizes, device = report.sizes, report.device
    tokens = 2 * sizes.checked_tokens if tokens is None else tokens
    count = 2048 if report.device == "cuda" else 8
    parts = 3 if gated else 2
    wide = torch.randn(count, parts, sizes.dim, device=device) * sizes.dim**-0.5
    rows, scales = wide.to(dtype), None
    if dtype in SCALED_DTYPES:
        rows, scales = quantise(wide, dtype)
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
        if each is not None and each.is_floating_point() and each.dtype not in SCALED_DTYPES:
            each = (each.double() if wide else each).detach().requires_grad_()
        leaves.append(each)
    x, weights, ids, rows, scales = leaves
    if wide and scales is not None:
        rows, scales = widened(rows, scales.detach().double()), None
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
    actual = _mixed(inputs, activation, backend, row_gradients=dtype not in SCALED_DTYPES)
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
    x, weights, ids = (each[:1] for each in inputs[:3])
    if not torch.equal(api.mix_experts(x, weights, ids, rows, backend=backend), first["y"][:1]):
        different.append("y of one token alone")
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
