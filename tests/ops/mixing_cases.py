"""Mixing by a backend's kernels against float64: what tests of several backends share."""

from typing import Any

import torch
from torch import Tensor

from peerlm.ops import api
from peerlm.ops.row_formats import quantise
from peerlm.testing import MixInputs, assert_within_budget, mix_inputs


def widened(inputs: MixInputs, rows: Tensor | None = None) -> MixInputs:
    """The same values in float64, as leaves; `rows` take the place of theirs."""
    taken = inputs.rows if rows is None else rows
    return MixInputs(x=inputs.x, weights=inputs.weights, ids=inputs.ids, rows=taken).to(torch.float64)


def in_float32(inputs: MixInputs, row_dtype: torch.dtype = torch.float32) -> MixInputs:
    """Arguments in float32, as leaves, with rows in `row_dtype`."""
    rows = inputs.rows.detach().to(row_dtype).requires_grad_()
    single = inputs.to(torch.float32)
    return MixInputs(x=single.x, weights=single.weights, ids=single.ids, rows=rows)


def output_and_gradients(inputs: MixInputs, scales: Tensor | None = None, **options: Any) -> dict[str, Tensor]:
    """By name: y and the gradients, of those that require one, of a fixed weighted sum of it."""
    y = api.mix_experts(*inputs.arguments(), scales, **options)
    names = [name for name in ("x", "weights", "rows") if getattr(inputs, name).requires_grad]
    coefficients = torch.linspace(-1, 1, max(y.numel(), 1), dtype=torch.float64)[: y.numel()].view(y.shape)
    gradients = torch.autograd.grad((y * coefficients.to(y.dtype)).sum(), [getattr(inputs, n) for n in names])
    return {"y": y.detach(), **dict(zip(names, gradients, strict=True))}


def assert_kernels_within_budget(
    drawn: MixInputs,
    row_dtype: torch.dtype = torch.float32,
    *,
    backend: str,
    activation: str = "gelu",
    row_gradients: bool = False,
) -> dict[str, Tensor]:
    """The kernels' output and gradients, which err no more than the definition's in the same dtypes may.

    Both are judged by x and weights before these were rounded to float32: where sums cancel, what that loses is what
    any order of summation may lose.
    """
    inputs, scales = in_float32(drawn), None
    if row_dtype.itemsize == 1:
        rows, scales = quantise(inputs.rows.detach(), row_dtype)
        stored = rows.double() * scales.double()[..., None]
    else:
        rows = stored = inputs.rows.detach().to(row_dtype).requires_grad_()
    inputs = MixInputs(x=inputs.x, weights=inputs.weights, ids=inputs.ids, rows=rows)
    options = {"activation": activation, "row_gradients": row_gradients}
    actual = output_and_gradients(inputs, scales, backend=backend, **options)
    plain = output_and_gradients(inputs, scales, backend="reference", **options)
    exact = output_and_gradients(widened(drawn, stored), activation=activation, backend="reference")
    assert_within_budget(actual, plain, {name: exact[name] for name in actual})  # 8-bit rows have no gradient
    return actual


def draw(tokens: int, per_token: int, dim: int, num_experts: int, **options: Any) -> MixInputs:
    """Inputs with u and g scaled for neurons of unit variance; float32 holds none of the numbers."""
    inputs = mix_inputs(tokens, per_token, dim, num_experts, **options)
    with torch.no_grad():
        inputs.x.mul_(0.9)
        inputs.weights.mul_(0.9)
        inputs.rows[:, ::2] *= dim**-0.5
    return inputs
