"""The native kernels as operators on the CPU: tensors in, `_native` called.

They compute in float32; rows may be float32 or bfloat16, or int8 or float8_e4m3fn with scales. Results are the same
bits for any number of threads.
"""

import os

import torch
from torch import Tensor

from peerlm.errors import UserError
from peerlm.ops.cpu import native
from peerlm.ops.cpu.attention_step import added_norm, attention_step, through_blocks
from peerlm.ops.cpu.decode import whole_layer
from peerlm.ops.cpu.native import as_bytes, description, group_by_row, move_to_start, unavailable, use_huge_pages
from peerlm.ops.cpu.onednn import linear
from peerlm.ops.cpu.rows import fit_rules, row_kernels, update_by_gradients, updates_rows_on
from peerlm.ops.operators import PEERLM
from peerlm.ops.row_formats import SCALED_DTYPES
from peerlm.ops.tensors import not_plain

__all__ = [
    "added_norm",
    "attention_step",
    "description",
    "dot_values",
    "fit_rules",
    "linear",
    "mix_experts",
    "mix_values",
    "move_to_start",
    "retrieve",
    "row_kernels",
    "through_blocks",
    "unavailable",
    "unsupported",
    "updates_rows_on",
    "use_huge_pages",
    "whole_layer",
]

retrieve, mix_experts = PEERLM.retrieve, PEERLM.mix_experts
mix_values, dot_values = PEERLM.mix_values, PEERLM.dot_values

ROW_DTYPES = (torch.float32, torch.bfloat16, *SCALED_DTYPES)
_INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INT8_FROM = 1 << 16
"""Numbers in a half's sub-keys from which on comparing them in 8 bits saves more than its longer shortlist costs."""


def unsupported(
    op: str,
    *inputs: Tensor,
    ids: Tensor | None = None,
    rows: Tensor | None = None,
    scales: Tensor | None = None,
    row_gradients: bool = False,
) -> str:
    """Why these arguments cannot be computed here; empty where they can."""
    if op == "linear":
        return ""  # what oneDNN cannot multiply, PyTorch does
    tensors = (*inputs, ids, rows, scales)
    for tensor in tensors:
        if tensor is not None and not tensor.is_cpu:
            return f"a tensor is on {tensor.device}, and the native kernels run on the CPU"
    for tensor in inputs:
        if tensor.dtype not in _INPUT_DTYPES:
            return f"a tensor has dtype {tensor.dtype}, and the native kernels compute in float32"
    if rows is not None and rows.dtype not in ROW_DTYPES:
        taken = ", ".join(str(dtype).removeprefix("torch.") for dtype in ROW_DTYPES)
        return f"rows have dtype {rows.dtype}, and the native kernels take {taken}"
    return not_plain(*tensors)


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


def _mix_experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    rows: Tensor,
    scales: Tensor | None,
    activation: str,
    row_gradients: bool,
) -> tuple[Tensor, Tensor]:
    y, hidden = torch.empty_like(x), x.new_empty(*ids.shape, rows.shape[1] - 1)
    native.module.mix(
        x.detach(),
        weights.detach(),
        ids,
        as_bytes(rows.detach()),
        scales,
        activation,
        torch.get_num_threads(),
        hidden,
        y,
    )
    return y, hidden


def _mix_experts_backward(
    grad_y: Tensor,
    weights: Tensor,
    ids: Tensor,
    hidden: Tensor,
    rows: Tensor,
    scales: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    coefficients = weights.new_empty(*ids.shape, rows.shape[1])
    grads = torch.empty_like(grad_y), torch.empty_like(weights), coefficients
    native.module.mix_backward(
        grad_y.detach(),
        weights.detach(),
        ids,
        hidden,
        as_bytes(rows.detach()),
        scales,
        activation,
        torch.get_num_threads(),
        *grads,
    )
    return grads


def _mix_values(weights: Tensor, ids: Tensor, values: Tensor, row_gradients: bool) -> Tensor:
    y = weights.new_empty(weights.shape[0], values.shape[1])
    rows = values.detach()[:, None]
    native.module.mix(None, weights.detach(), ids, rows, None, "identity", torch.get_num_threads(), None, y)
    return y


def _mix_values_backward(grad_y: Tensor, weights: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    grad_weights = torch.empty_like(weights)
    rows, threads = values.detach()[:, None], torch.get_num_threads()
    native.module.mix_backward(
        grad_y.detach(), weights.detach(), ids, None, rows, None, "identity", threads, None, grad_weights, None
    )
    return grad_weights


def _dot_values(x: Tensor, ids: Tensor, values: Tensor, row_gradients: bool) -> Tensor:
    """What `mix_values` gives its weights as a gradient, were x the gradient of its result."""
    return _mix_values_backward(x, x.new_empty(ids.shape), ids, values)


def _row_gradients(x: Tensor | None, grad_y: Tensor, ids: Tensor, coefficients: Tensor, num_rows: int) -> Tensor:
    grad = grad_y.new_zeros(num_rows, coefficients.shape[-1], grad_y.shape[-1])
    _sum_row_gradients(*group_by_row(ids, num_rows), x, grad_y, coefficients, grad, compact=False)
    return grad


def _gradients_by_row(
    x: Tensor | None, grad_y: Tensor, ids: Tensor, coefficients: Tensor, num_rows: int
) -> tuple[Tensor, Tensor]:
    """The rows that occur, ascending, and their gradients."""
    order, starts, found = group_by_row(ids, num_rows)
    grad = native.recycled(len(found), coefficients.shape[-1], grad_y.shape[-1])
    _sum_row_gradients(order, starts, found, x, grad_y, coefficients, grad, compact=True)
    return found, grad


def _sum_row_gradients(
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


if native.module is not None:
    PEERLM.implement(
        {
            "retrieve": _retrieve,
            "retrieve_backward": _retrieve_backward,
            "mix_experts": _mix_experts,
            "mix_experts_backward": _mix_experts_backward,
            "mix_values": _mix_values,
            "mix_values_backward": _mix_values_backward,
            "dot_values": _dot_values,
            "row_gradients": _row_gradients,
            "gradients_by_row": _gradients_by_row,
        },
        "CPU",
    )
    PEERLM.implement_fused_update(update_by_gradients, "cpu")
