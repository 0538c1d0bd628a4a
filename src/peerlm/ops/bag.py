"""Expert mixing through PyTorch's embedding bags: the gathered rows are never materialised.

A bag is the sparse product C @ table, where row t of C (T, N) holds token t's coefficients. All of PEER's arithmetic is
made of it and its derivatives: the neurons' inputs u . x are the derivative of a bag with respect to its coefficients,
and every gradient is a bag or a transposed bag. Shape suffixes as in `reference.py`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from peerlm.ops.functions import ACTIVATIONS
from peerlm.ops.tensors import has_values, may_have_holes, not_plain

_SUM = 0  # the code of mode="sum" in the ATen operators


def description() -> str:
    """What this backend is, in one phrase."""
    return "expert mixing by PyTorch's embedding bags, any device, gathered rows are never materialised"


def unavailable() -> str:
    """Why this machine does not have this backend: never."""
    return ""


def unsupported(
    op: str,
    *inputs: Tensor,
    ids: Tensor | None = None,
    rows: Tensor | None = None,
    scales: Tensor | None = None,
    row_gradients: bool = False,
) -> str:
    """Why these arguments cannot be computed here; empty where they can."""
    if op in ("linear", "retrieve"):
        return ""  # not of this module
    if row_gradients:
        return "embedding bags have no sparse row gradients"
    if scales is not None or (rows is not None and not rows.is_floating_point()):
        return "embedding bags take no rows of 8 bits"
    if rows is not None and len(rows) == 0:
        return "embedding bags need a table with rows"
    return not_plain(*inputs, ids, rows)


class _RowDots(torch.autograd.Function):
    """x_t . table[ids[t, p]] for every token and each of its rows."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, table_ND: Tensor, ids_TP: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, table_ND, ids_TP)
        _check_ids(ids_TP, len(table_ND))
        token_of_entry, offsets = _bags(ids_TP)
        dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            x_TD, table_ND, ids_TP.reshape(-1), offsets, token_of_entry, _SUM
        )
        return dots.view(ids_TP.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TP: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_TD, table_ND, ids_TP = ctx.saved_tensors
        needs_x, needs_table, _ = ctx.needs_input_grad
        grad_x = _sum_bags(grad_TP, ids_TP, table_ND) if needs_x else None
        return grad_x, _table_gradient(grad_TP, x_TD, ids_TP, table_ND) if needs_table else None, None


def _check_ids(ids_TP: Tensor, num_rows: int) -> None:
    """Raise an IndexError where a row does not exist: PyTorch's operator would read beyond the table."""
    if ids_TP.device.type == "cpu" and has_values(ids_TP) and ids_TP.numel():
        lowest, highest = (int(bound) for bound in ids_TP.aminmax())
        if lowest < -1 or highest >= num_rows:
            raise IndexError(f"ids are in {lowest} .. {highest}, but the table has rows 0 .. {num_rows - 1}")


def _bags(ids_TP: Tensor) -> tuple[Tensor, Tensor]:
    """The token of every entry, and the first entry of every token."""
    tokens, per_token = ids_TP.shape
    token_T = torch.arange(tokens, device=ids_TP.device)
    return token_T.repeat_interleave(per_token), token_T * per_token


def _table_gradient(weights_TP: Tensor, grad_TD: Tensor, ids_TP: Tensor, table_ND: Tensor) -> Tensor:
    """The gradient of the table of bags with these weights, where their gradient is grad (T, D)."""
    token_of_entry, offsets = _bags(ids_TP)
    return torch.ops.aten._embedding_bag_dense_backward(
        grad_TD,
        ids_TP.reshape(-1),
        token_of_entry,
        torch.full_like(offsets, ids_TP.shape[1]),
        offsets[:0],  # of mode="max" alone
        table_ND.shape[0],
        False,
        _SUM,
        weights_TP.to(table_ND.dtype).reshape(-1),
    )


def _wide(rows: Tensor, ids_TP: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in float32 at least, and where these ids are among them: of narrower ones a copy of those that occur."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    if rows.dtype == dtype:
        return rows, ids_TP
    _check_ids(ids_TP, len(rows))
    if not has_values(ids_TP):  # a tracer does not know how many occur
        return rows.to(dtype), ids_TP
    used, places_TP = _distinct(ids_TP, len(rows))
    return rows.index_select(0, used).to(dtype), places_TP


def _distinct(ids_TP: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Ids without repetitions, and each entry's place among them.

    Only a CPU is asked how many they are. Another device would be waited for: there as many are given as there may be,
    the last of them 0.
    """
    if ids_TP.device.type == "cpu":
        return ids_TP.unique(return_inverse=True)
    return _padded_distinct(ids_TP, num_rows)


def _padded_distinct(ids_TP: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    sorted_E, order_E = ids_TP.flatten().sort()
    place_E = torch.zeros_like(sorted_E)
    place_E[1:] = (sorted_E[1:] != sorted_E[:-1]).cumsum(0)
    used = sorted_E.new_zeros(min(len(sorted_E), num_rows)).scatter_(0, place_E, sorted_E)  # equal ones, one place
    return used, torch.empty_like(place_E).scatter_(0, order_E, place_E).view(ids_TP.shape)


def _sum_bags(weights_TP: Tensor, ids_TP: Tensor, table_ND: Tensor) -> Tensor:
    """The bags of a table whose dtype is that of the arithmetic."""
    weights = weights_TP.to(table_ND.dtype).contiguous()
    return F.embedding_bag(ids_TP.contiguous(), table_ND, per_sample_weights=weights, mode="sum")


def _without_holes(ids_TP: Tensor) -> tuple[Tensor, Tensor | None]:
    """Ids with row 0 in the place of -1, and which were -1; None where none was."""
    if not may_have_holes(ids_TP):
        return ids_TP, None
    hole_TP = ids_TP == -1
    return torch.where(hole_TP, 0, ids_TP), hole_TP


def _spared(values_TP: Tensor, hole_TP: Tensor | None) -> Tensor:
    """Values of entries, zeros where there are holes."""
    return values_TP if hole_TP is None else values_TP.masked_fill(hole_TP, 0)


def mix_values(weights_TP: Tensor, ids_TP: Tensor, values_ND: Tensor) -> Tensor:
    """As `reference.mix_values`."""
    ids_TP, hole_TP = _without_holes(ids_TP)
    table, places_TP = _wide(values_ND, ids_TP)
    return _sum_bags(_spared(weights_TP, hole_TP), places_TP, table).to(values_ND.dtype)


def dot_values(x_TD: Tensor, ids_TP: Tensor, values_ND: Tensor) -> Tensor:
    """As `reference.dot_values`, but differentiable once only."""
    ids_TP, hole_TP = _without_holes(ids_TP)
    table, places_TP = _wide(values_ND, ids_TP)
    return _spared(_RowDots.apply(x_TD.to(table.dtype).contiguous(), table, places_TP.contiguous()), hole_TP)


def mix_experts(
    x_TD: Tensor,
    weights_TP: Tensor,
    ids_TP: Tensor,
    rows_NRD: Tensor,
    scales_NR: Tensor | None,
    activation: str,
) -> Tensor:
    """As `reference.mix_experts`, but differentiable once only, and without scales."""
    _, parts, dim = rows_NRD.shape
    ids_TP, hole_TP = _without_holes(ids_TP)
    rows, places_TP = _wide(rows_NRD, ids_TP)
    table = rows.reshape(-1, dim)
    first_TP = places_TP * parts
    x = x_TD.to(table.dtype).contiguous()
    hidden_TP = _RowDots.apply(x, table, first_TP)
    if parts == 2:
        hidden_TP = ACTIVATIONS[activation](hidden_TP)
    else:
        hidden_TP = hidden_TP * ACTIVATIONS[activation](_RowDots.apply(x, table, first_TP + 2))
    factor_TP = _spared(hidden_TP * weights_TP.to(hidden_TP.dtype), hole_TP)
    return _sum_bags(factor_TP, first_TP + 1, table).to(x_TD.dtype)
