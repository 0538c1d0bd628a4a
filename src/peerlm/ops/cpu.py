"""Native CPU kernels as PyTorch operators: tensors in, `peerlm.ops._native` called, gradients registered.

The operators `torch.ops.peerlm.*` have a schema, a fake for tracing and an autograd formula, so that torch.compile,
torch.export and gradient checkpointing take models that use them. They compute in float32; rows may be float32,
bfloat16 or int8 with scales. Results are the same bits for any number of threads. Shape suffixes as in `reference.py`.
"""

import os
from typing import Any

import torch
from torch import Tensor

from peerlm.errors import UserError
from peerlm.ops import cpu_rows, native
from peerlm.ops.native import group_by_row
from peerlm.ops.row_updates import fused_row_update

ROW_DTYPES = (torch.float32, torch.bfloat16, torch.int8)
_INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INT8_FROM = 1 << 16
"""Numbers in a half's sub-keys from which on comparing them in 8 bits saves more than its longer shortlist costs."""


def unsupported(*inputs: Tensor, rows: Tensor | None = None) -> str:
    """Why these arguments cannot be computed here; empty where they can."""
    if reason := native.unavailable():
        return reason
    for tensor in inputs if rows is None else (*inputs, rows):
        if tensor.device.type != "cpu":
            return f"a tensor is on {tensor.device}, and the native kernels run on the CPU"
    for tensor in inputs:
        if tensor.dtype not in _INPUT_DTYPES:
            return f"a tensor has dtype {tensor.dtype}, and the native kernels compute in float32"
    if rows is not None and rows.dtype not in ROW_DTYPES:
        return f"rows have dtype {rows.dtype}, and the native kernels take float32, bfloat16 and int8"
    return ""


def retrieve(
    query_THX: Tensor, sub_keys_2HnC: Tensor, k: int, weighting: str, pairing: str = "row-major"
) -> tuple[Tensor, Tensor]:
    """As `reference.retrieve`, but differentiable once only; ids are those of float64 scores."""
    query = query_THX.float().contiguous()
    return torch.ops.peerlm.retrieve(query, sub_keys_2HnC.float().contiguous(), k, weighting, pairing)


def mix_experts(
    x_TD: Tensor,
    weights_TP: Tensor,
    ids_TP: Tensor,
    rows_NRD: Tensor,
    scales_NR: Tensor | None,
    activation: str,
    *,
    row_gradients: bool = False,
) -> Tensor:
    """As `reference.mix_experts`, but differentiable once only; the arithmetic is in float32.

    With `row_gradients` the gradient of the rows is a sparse tensor, coalesced, of those that occur.
    """
    x, weights = x_TD.float().contiguous(), weights_TP.float().contiguous()
    y, _ = torch.ops.peerlm.mix_experts(
        x, weights, ids_TP.contiguous(), rows_NRD.contiguous(), scales_NR, activation, row_gradients
    )
    return y.to(x_TD.dtype)


def mix_values(weights_TP: Tensor, ids_TP: Tensor, values_ND: Tensor, *, row_gradients: bool = False) -> Tensor:
    """As `reference.mix_values`, but differentiable once only; `row_gradients` as in `mix_experts`."""
    weights = weights_TP.float().contiguous()
    y = torch.ops.peerlm.mix_values(weights, ids_TP.contiguous(), values_ND.contiguous(), row_gradients)
    return y.to(values_ND.dtype)


def dot_values(x_TD: Tensor, ids_TP: Tensor, values_ND: Tensor, *, row_gradients: bool = False) -> Tensor:
    """As `reference.dot_values`, but differentiable once only, in float32; `row_gradients` as in `mix_experts`."""
    return torch.ops.peerlm.dot_values(
        x_TD.float().contiguous(), ids_TP.contiguous(), values_ND.contiguous(), row_gradients
    )


_LIBRARY = torch.library.Library("peerlm", "DEF")
_LIBRARY.define(
    "retrieve(Tensor query, Tensor sub_keys, int k, str weighting, str pairing='row-major') -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "retrieve_backward(Tensor grad_weights, Tensor weights, Tensor ids, Tensor query, Tensor sub_keys, str weighting,"
    " str pairing='row-major') -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "mix_experts(Tensor x, Tensor weights, Tensor ids, Tensor rows, Tensor? scales, str activation, bool row_gradients)"
    " -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "mix_experts_backward(Tensor grad_y, Tensor weights, Tensor ids, Tensor hidden, Tensor rows, Tensor? scales,"
    " str activation) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define("mix_values(Tensor weights, Tensor ids, Tensor values, bool row_gradients) -> Tensor")
_LIBRARY.define("mix_values_backward(Tensor grad_y, Tensor weights, Tensor ids, Tensor values) -> Tensor")
_LIBRARY.define("dot_values(Tensor x, Tensor ids, Tensor values, bool row_gradients) -> Tensor")
_LIBRARY.define("row_gradients(Tensor? x, Tensor grad_y, Tensor ids, Tensor coefficients, SymInt num_rows) -> Tensor")


def _scores(sub_keys: Tensor) -> str:
    """What sub-keys (2, H or 1, n, C) are compared in first: the quickest, or what PEERLM_SCORES names if here."""
    wanted = os.environ.get("PEERLM_SCORES") or ("int8" if sub_keys[0, 0].numel() >= _INT8_FROM else "bf16")
    if wanted not in ("int8", "bf16", "fp32"):
        raise UserError(f"PEERLM_SCORES is {wanted!r}; set it to int8, bf16 or fp32, or not at all")
    return wanted if native.module.has_scores(wanted) else "fp32"


def _retrieve(
    query: Tensor, sub_keys: Tensor, k: int, weighting: str, pairing: str = "row-major"
) -> tuple[Tensor, Tensor]:
    tokens, heads, key_dim = query.shape
    weights = query.new_empty(tokens, heads, k)
    ids = query.new_empty(tokens, heads, k, dtype=torch.int64)
    native.module.retrieve(
        query.detach().view(tokens, heads, 2, key_dim // 2),
        sub_keys.detach(),
        k,
        weighting,
        pairing,
        _scores(sub_keys),
        torch.get_num_threads(),
        weights,
        ids,
    )
    return weights, ids


def _retrieve_fake(
    query: Tensor, sub_keys: Tensor, k: int, weighting: str, pairing: str = "row-major"
) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], query.shape[1], k)
    return query.new_empty(shape), query.new_empty(shape, dtype=torch.int64)


def _retrieve_backward(
    grad_weights: Tensor,
    weights: Tensor,
    ids: Tensor,
    query: Tensor,
    sub_keys: Tensor,
    weighting: str,
    pairing: str = "row-major",
) -> tuple[Tensor, Tensor]:
    tokens, heads, key_dim = query.shape
    halves = (tokens, heads, 2, key_dim // 2)
    grad_query, grad_sub_keys = torch.empty_like(query), torch.empty_like(sub_keys)
    native.module.retrieve_backward(
        grad_weights.detach().contiguous(),
        weights.detach(),
        ids,
        query.detach().view(halves),
        sub_keys.detach(),
        weighting,
        pairing,
        torch.get_num_threads(),
        grad_query.view(halves),
        grad_sub_keys,
    )
    return grad_query, grad_sub_keys


def _retrieve_backward_fake(
    grad_weights: Tensor,
    weights: Tensor,
    ids: Tensor,
    query: Tensor,
    sub_keys: Tensor,
    weighting: str,
    pairing: str = "row-major",
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(sub_keys)


def _retrieve_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, sub_keys, _, ctx.weighting, ctx.pairing = inputs
    weights, ids = output
    ctx.mark_non_differentiable(ids)
    ctx.save_for_backward(weights, ids, query, sub_keys)


def _retrieve_gradients(ctx: Any, grad_weights: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grad_query, grad_sub_keys = torch.ops.peerlm.retrieve_backward(
        grad_weights, *ctx.saved_tensors, ctx.weighting, ctx.pairing
    )
    return grad_query, grad_sub_keys, None, None, None


def _mix_experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    rows: Tensor,
    scales: Tensor | None,
    activation: str,
    row_gradients: bool,
) -> tuple[Tensor, Tensor]:
    y, hidden = _mix_experts_fake(x, weights, ids, rows, scales, activation, row_gradients)
    native.module.mix(
        x.detach(),
        weights.detach(),
        ids,
        rows.detach(),
        scales,
        activation,
        torch.get_num_threads(),
        hidden,
        y,
    )
    return y, hidden


def _mix_experts_fake(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    rows: Tensor,
    scales: Tensor | None,
    activation: str,
    row_gradients: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(*ids.shape, rows.shape[1] - 1)


def _mix_experts_backward(
    grad_y: Tensor,
    weights: Tensor,
    ids: Tensor,
    hidden: Tensor,
    rows: Tensor,
    scales: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _mix_experts_backward_fake(grad_y, weights, ids, hidden, rows, scales, activation)
    native.module.mix_backward(
        grad_y.detach(),
        weights.detach(),
        ids,
        hidden,
        rows.detach(),
        scales,
        activation,
        torch.get_num_threads(),
        *grads,
    )
    return grads


def _mix_experts_backward_fake(
    grad_y: Tensor,
    weights: Tensor,
    ids: Tensor,
    hidden: Tensor,
    rows: Tensor,
    scales: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(grad_y), torch.empty_like(weights), weights.new_empty(*ids.shape, rows.shape[1])


def _mix_experts_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weights, ids, rows, scales, ctx.activation, ctx.row_gradients = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weights, ids, output[1], rows, scales)


def _mix_experts_gradients(ctx: Any, grad_y: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 7
    x, weights, ids, hidden, rows, scales = ctx.saved_tensors
    grad_y = grad_y.contiguous()
    grad_x, grad_weights, coefficients = torch.ops.peerlm.mix_experts_backward(
        grad_y, weights, ids, hidden, rows, scales, ctx.activation
    )
    grad_rows = None
    if ctx.needs_input_grad[3]:
        grad_rows = _gradient_of_rows(x, grad_y, ids, coefficients, rows, by_row=ctx.row_gradients)
    return grad_x, grad_weights, None, grad_rows, None, None, None


def _mix_values(weights: Tensor, ids: Tensor, values: Tensor, row_gradients: bool) -> Tensor:
    y = _mix_values_fake(weights, ids, values, row_gradients)
    rows = values.detach()[:, None]
    native.module.mix(None, weights.detach(), ids, rows, None, "identity", torch.get_num_threads(), None, y)
    return y


def _mix_values_fake(weights: Tensor, ids: Tensor, values: Tensor, row_gradients: bool) -> Tensor:
    return weights.new_empty(weights.shape[0], values.shape[1])


def _mix_values_backward(grad_y: Tensor, weights: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    grad_weights = torch.empty_like(weights)
    rows, threads = values.detach()[:, None], torch.get_num_threads()
    native.module.mix_backward(
        grad_y.detach(), weights.detach(), ids, None, rows, None, "identity", threads, None, grad_weights, None
    )
    return grad_weights


def _mix_values_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, ids, values, ctx.row_gradients = inputs
    ctx.save_for_backward(weights, ids, values)


def _mix_values_gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    weights, ids, values = ctx.saved_tensors
    grad_y = grad_y.contiguous()
    grad_weights = torch.ops.peerlm.mix_values_backward(grad_y, weights, ids, values)
    grad_values = None
    if ctx.needs_input_grad[2]:
        grad_values = _gradient_of_rows(None, grad_y, ids, weights[..., None], values, by_row=ctx.row_gradients)
    return grad_weights, None, grad_values, None


def _dot_values(x: Tensor, ids: Tensor, values: Tensor, row_gradients: bool) -> Tensor:
    """What `mix_values` gives its weights as a gradient, were x the gradient of its result."""
    return _mix_values_backward(x, x.new_empty(ids.shape), ids, values)


def _dot_values_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ids, values, ctx.row_gradients = inputs
    ctx.save_for_backward(x, ids, values)


def _dot_values_gradients(ctx: Any, grad_dots: Tensor) -> tuple[Tensor | None, ...]:
    x, ids, values = ctx.saved_tensors
    grad_dots = grad_dots.contiguous()
    grad_x = torch.ops.peerlm.mix_values(grad_dots, ids, values, False) if ctx.needs_input_grad[0] else None
    grad_values = None
    if ctx.needs_input_grad[2]:
        grad_values = _gradient_of_rows(None, x, ids, grad_dots[..., None], values, by_row=ctx.row_gradients)
    return grad_x, None, grad_values, None


def _gradient_of_rows(
    x: Tensor | None, grad_y: Tensor, ids: Tensor, coefficients: Tensor, rows: Tensor, *, by_row: bool
) -> Tensor | None:
    """Gradient of `rows` in their shape and dtype: dense, or by row sparse; None where an optimizer has used it up."""
    if not by_row:
        grad = torch.ops.peerlm.row_gradients(x, grad_y, ids, coefficients, rows.shape[0])
        return grad.view(rows.shape).to(rows.dtype)
    if (update := fused_row_update(rows)) is not None:
        cpu_rows.update_by_gradients(*update, x, grad_y, ids, coefficients)
        return None
    order, starts, found = group_by_row(ids, rows.shape[0])
    grad = native.recycled(len(found), coefficients.shape[-1], grad_y.shape[-1])
    _native_row_gradients(order, starts, found, x, grad_y, coefficients, grad, compact=True)
    values = grad.view(-1, *rows.shape[1:]).to(rows.dtype)
    return torch.sparse_coo_tensor(found[None], values, rows.shape, is_coalesced=True, check_invariants=False)


def _native_row_gradients(
    order: Tensor,
    starts: Tensor,
    found: Tensor,
    x: Tensor | None,
    grad_y: Tensor,
    coefficients: Tensor,
    out: Tensor,
    *,
    compact: bool,
) -> None:
    native.module.row_gradients(
        order,
        starts,
        found,
        None if x is None else x.detach(),
        grad_y.detach(),
        coefficients.detach().contiguous(),
        torch.get_num_threads(),
        compact,
        out,
    )


def _row_gradients(x: Tensor | None, grad_y: Tensor, ids: Tensor, coefficients: Tensor, num_rows: int) -> Tensor:
    grad = grad_y.new_zeros(num_rows, coefficients.shape[-1], grad_y.shape[-1])
    _native_row_gradients(*group_by_row(ids, num_rows), x, grad_y, coefficients, grad, compact=False)
    return grad


def _row_gradients_fake(x: Tensor | None, grad_y: Tensor, ids: Tensor, coefficients: Tensor, num_rows: int) -> Tensor:
    return grad_y.new_empty(num_rows, coefficients.shape[-1], grad_y.shape[-1])


def _refuse_second_derivatives(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("the native kernels are differentiable once only; backend 'reference' is twice")


for _name, _kernel, _fake in (
    ("retrieve", _retrieve, _retrieve_fake),
    ("retrieve_backward", _retrieve_backward, _retrieve_backward_fake),
    ("mix_experts", _mix_experts, _mix_experts_fake),
    ("mix_experts_backward", _mix_experts_backward, _mix_experts_backward_fake),
    ("mix_values", _mix_values, _mix_values_fake),
    ("mix_values_backward", _mix_values_backward, lambda grad_y, weights, ids, values: torch.empty_like(weights)),
    ("dot_values", _dot_values, lambda x, ids, values, row_gradients: x.new_empty(ids.shape)),
    ("row_gradients", _row_gradients, _row_gradients_fake),
):
    _LIBRARY.impl(_name, _kernel, "CPU")
    torch.library.register_fake(f"peerlm::{_name}", _fake, lib=_LIBRARY)
for _name, _save, _gradients in (
    ("retrieve", _retrieve_save, _retrieve_gradients),
    ("mix_experts", _mix_experts_save, _mix_experts_gradients),
    ("mix_values", _mix_values_save, _mix_values_gradients),
    ("dot_values", _dot_values_save, _dot_values_gradients),
):
    torch.library.register_autograd(f"peerlm::{_name}", _gradients, setup_context=_save, lib=_LIBRARY)
for _name in ("retrieve_backward", "mix_experts_backward", "mix_values_backward", "row_gradients"):
    torch.library.register_autograd(f"peerlm::{_name}", _refuse_second_derivatives, lib=_LIBRARY)
