"""Products of rows in groups with one matrix per group, as operators that torch.compile takes in any dtype.

M rows, those of a group one after another; E groups; D and F widths; `ends` (E,) int32 counts the rows up to the end of
each group. By `torch.nn.functional.grouped_mm` where it takes the dtype and widths (float32 and half precision, rows of
a multiple of 16 bytes), which wastes nothing on uneven groups; otherwise by one batched product of groups that are
padded to the longest.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNMENT_BYTES = 16


def grouped_product(x_MD: Tensor, weights_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply each row by the matrix of its group: (M, F), in the dtype of the inputs, or that of autocast."""
    device = x_MD.device.type
    if torch.is_autocast_enabled(device):
        narrow = torch.get_autocast_dtype(device)
        x_MD, weights_EDF = x_MD.to(narrow), weights_EDF.to(narrow)
    return rows_by_matrices(x_MD, weights_EDF, ends_E)


@torch.library.custom_op("peerlm::rows_by_matrices", mutates_args=())
def rows_by_matrices(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Rows (M, D) by a matrix (D, F) per group: (M, F)."""
    if _is_taken(x, *weights.shape[1:]):
        return F.grouped_mm(x, weights, offs=ends)
    places, shape = _places(ends, len(x))
    return torch.bmm(_padded(x, places, shape), weights).flatten(0, 1).index_select(0, places)


@torch.library.custom_op("peerlm::matrices_of_rows", mutates_args=())
def matrices_of_rows(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    """The sum over each group of outer products of rows (M, D) and (M, F): (E, D, F)."""
    if _is_taken(x, x.shape[1], y.shape[1]):
        return F.grouped_mm(x.T, y, offs=ends)
    places, shape = _places(ends, len(x))
    return torch.bmm(_padded(x, places, shape).mT, _padded(y, places, shape))


def _is_taken(x: Tensor, *widths: int) -> bool:
    aligned = all(width * x.element_size() % _ALIGNMENT_BYTES == 0 for width in widths)
    return x.dtype in _DTYPES and aligned and len(x) > 0


def _places(ends: Tensor, rows: int) -> tuple[Tensor, tuple[int, int]]:
    """Where each row is if every group has the rows of the longest, and that number (groups, rows)."""
    ends = ends.long()
    counts = ends.diff(prepend=ends.new_zeros(1))
    longest = int(counts.max())
    groups = torch.arange(len(ends), device=ends.device).repeat_interleave(counts, output_size=rows)
    own = torch.arange(rows, device=ends.device) - (ends - counts)[groups]
    return longest * groups + own, (len(ends), longest)


def _padded(x: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    return x.new_zeros(shape[0] * shape[1], x.shape[1]).index_copy(0, places, x).unflatten(0, shape)


@rows_by_matrices.register_fake
def _(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weights.shape[2])


@matrices_of_rows.register_fake
def _(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], x.shape[1], y.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _rows_by_matrices_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weights, ends = ctx.saved_tensors
    grad = grad.contiguous()
    needs_x, needs_weights, _ = ctx.needs_input_grad
    grad_x = rows_by_matrices(grad, weights.mT, ends) if needs_x else None
    return grad_x, matrices_of_rows(x, grad, ends) if needs_weights else None, None


def _matrices_of_rows_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, y, ends = ctx.saved_tensors
    grad = grad.contiguous()
    needs_x, needs_y, _ = ctx.needs_input_grad
    grad_x = rows_by_matrices(y, grad.mT, ends) if needs_x else None
    return grad_x, rows_by_matrices(x, grad, ends) if needs_y else None, None


rows_by_matrices.register_autograd(_rows_by_matrices_backward, setup_context=_save)
matrices_of_rows.register_autograd(_matrices_of_rows_backward, setup_context=_save)
