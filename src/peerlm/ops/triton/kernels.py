"""The Triton kernels as a backend: what they take, and the operators that they implement.

They compute in float32, scores of sub-keys in float64; rows may be float32, bfloat16, float16, or of 8 bits with
scales. Results are the same bits in every run.
"""

from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import linear

from peerlm.ops.row_formats import EIGHT_BIT_DTYPES
from peerlm.ops.row_updates import RowState
from peerlm.ops.tensors import has_values, not_plain
from peerlm.ops.triton.limits import too_many_sub_keys
from peerlm.ops.triton.runtime import (
    DEVICE_TYPE,
    DISPATCH_KEY,
    INTERPRETED,
    OPERATORS,
    description,
    no_float8,
    on_another_device,
    too_old,
    unavailable,
)

__all__ = [
    "description",
    "dot_values",
    "linear",
    "mix_experts",
    "mix_values",
    "retrieve",
    "row_kernels",
    "sum_by_row",
    "unavailable",
    "unsupported",
    "updates_rows_on",
]

automatic = not INTERPRETED

device_type = "cuda"

retrieve, mix_experts = OPERATORS.retrieve, OPERATORS.mix_experts
mix_values, dot_values = OPERATORS.mix_values, OPERATORS.dot_values

_INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROW_DTYPES = (*_INPUT_DTYPES, *EIGHT_BIT_DTYPES)


def unsupported(
    op: str,
    *inputs: Tensor,
    ids: Tensor | None = None,
    rows: Tensor | None = None,
    scales: Tensor | None = None,
    row_gradients: bool = False,
) -> str:
    """Why these arguments cannot be computed here; empty where they can."""
    tensors = (*inputs, ids, rows, scales)
    if reason := on_another_device(*tensors) or too_old():
        return reason
    if op == "linear":
        return ""
    for tensor in inputs:
        if tensor.dtype not in _INPUT_DTYPES:
            return f"a tensor has dtype {tensor.dtype}, and the Triton kernels compute in float32"
    if rows is not None:
        if rows.dtype not in _ROW_DTYPES:
            taken = ", ".join(str(dtype).removeprefix("torch.") for dtype in _ROW_DTYPES)
            return f"rows have dtype {rows.dtype}, and the Triton kernels take {taken}"
        if rows.dtype == torch.float8_e4m3fn and (reason := no_float8()):
            return reason
    if op == "retrieve" and (reason := too_many_sub_keys(inputs[1])):
        return reason
    return not_plain(*tensors)


def updates_rows_on(device: torch.device) -> bool:
    """Whether there are kernels for tables on this device; interpreted ones are called by tests alone."""
    return device.type == DEVICE_TYPE and automatic and not unavailable() and not too_old()


def row_kernels(table: RowState) -> ModuleType | None:
    """The module with kernels for steps of this table; None where they do not work on it."""
    if not updates_rows_on(table.rows.device) or not has_values(table.rows):
        return None
    from peerlm.ops.triton import row_steps

    return row_steps if row_steps.supports(table) else None


def sum_by_row(ids: Tensor, values: Tensor, num_rows: int) -> tuple[Tensor, Tensor] | None:
    """As `api.sum_by_row`."""
    if not updates_rows_on(values.device) or values.dtype not in _INPUT_DTYPES:
        return None
    return row_gradients.sum_by_row(ids, values, num_rows)


if not unavailable():
    import peerlm.ops.triton.row_steps  # noqa: F401 -- an interpreter has to be on when kernels are defined
    from peerlm.ops.triton import experts, experts_backward, retrieval, row_gradients, values
    from peerlm.ops.triton.fused_update import update_by_gradients

    OPERATORS.implement(
        {
            "retrieve": retrieval.retrieve,
            "retrieve_backward": retrieval.retrieve_backward,
            "mix_experts": experts.mix_experts,
            "mix_experts_backward": experts_backward.mix_experts_backward,
            "mix_values": values.mix_values,
            "mix_values_backward": values.mix_values_backward,
            "dot_values": values.dot_values,
            "row_gradients": row_gradients.row_gradients,
        },
        DISPATCH_KEY,
    )
    OPERATORS.implement_fused_update(update_by_gradients, DEVICE_TYPE)
    OPERATORS.implement_padded_gradients(row_gradients.padded_gradients, DEVICE_TYPE)
