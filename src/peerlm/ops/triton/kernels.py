"""The Triton kernels as a backend: what they take, and the operators that they implement.

They compute in float32, scores of sub-keys in float64; rows may be float32, bfloat16, or 8-bit with scales. Results are
the same bits in every run.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from peerlm.ops.tensors import not_plain
from peerlm.ops.triton.limits import too_many_sub_keys
from peerlm.ops.triton.runtime import DISPATCH_KEY, INTERPRETED, OPERATORS, description, on_another_device, unavailable

__all__ = [
    "description",
    "dot_values",
    "linear",
    "mix_experts",
    "mix_values",
    "retrieve",
    "unavailable",
    "unsupported",
]

automatic = not INTERPRETED

retrieve, mix_experts = OPERATORS.retrieve, OPERATORS.mix_experts
mix_values, dot_values = OPERATORS.mix_values, OPERATORS.dot_values

_WRITTEN: dict[str, tuple[str, ...]] = {"retrieve": ("retrieve", "retrieve_backward")}
"""Operations, and the operators that they need; grows with the kernels."""

_INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    if reason := on_another_device(*tensors):
        return reason
    if op == "linear":
        return ""
    for tensor in inputs:
        if tensor.dtype not in _INPUT_DTYPES:
            return f"a tensor has dtype {tensor.dtype}, and the Triton kernels compute in float32"
    if op not in _WRITTEN:
        return f"Triton kernels for {op} are not written yet"
    if op == "retrieve" and (reason := too_many_sub_keys(inputs[1])):
        return reason
    return not_plain(*tensors)


if not unavailable():
    from peerlm.ops.triton import retrieval, row_gradients

    OPERATORS.implement(
        {
            "retrieve": retrieval.retrieve,
            "retrieve_backward": retrieval.retrieve_backward,
            "row_gradients": row_gradients.row_gradients,
            "gradients_by_row": row_gradients.gradients_by_row,
        },
        DISPATCH_KEY,
    )
