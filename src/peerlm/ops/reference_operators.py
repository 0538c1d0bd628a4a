"""The operators `torch.ops.peerlm.*` in eager PyTorch, gradients written out: for devices and dtypes without kernels.

A program of torch.export runs by these wherever there is nothing faster. Shape suffixes as in `reference.py`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from peerlm.ops import reference
from peerlm.ops.functions import ACTIVATIONS
from peerlm.ops.operators import PEERLM
from peerlm.ops.pairing import PAIRINGS
from peerlm.ops.row_formats import widened
from peerlm.ops.tensors import may_have_holes

Slope = Callable[[Tensor, Tensor], Tensor]
"""(gradient of a function's value, the function's argument) -> gradient of the argument."""


def _relu_slope(grad: Tensor, argument: Tensor) -> Tensor:
    return grad * (argument > 0)


def _softmax_slope(grad: Tensor, scores: Tensor) -> Tensor:
    weights = scores.softmax(dim=-1)
    return weights * (grad - (grad * weights).sum(dim=-1, keepdim=True))


_ACTIVATION_SLOPES: dict[str, Slope] = {
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": lambda grad, hidden: torch.ops.aten.gelu_backward(grad, hidden, approximate="tanh"),
    "relu": _relu_slope,
    "silu": torch.ops.aten.silu_backward,
    "identity": lambda grad, hidden: grad,
    "one_plus": lambda grad, hidden: grad,
}

_WEIGHTING_SLOPES: dict[str, Slope] = {
    "softmax": _softmax_slope,
    "sigmoid": lambda grad, scores: grad * torch.sigmoid(scores) * torch.sigmoid(-scores),
    "relu": _relu_slope,
    "none": lambda grad, scores: grad,
}


def _retrieve_backward(
    grad_weights_THK: Tensor,
    weights_THK: Tensor,
    ids_THK: Tensor,
    query_THX: Tensor,
    sub_keys_2HnC: Tensor,
    weighting: str,
    pairing: str = "row-major",
) -> tuple[Tensor, Tensor]:
    """Gradients of the query and of the sub-keys."""
    _, sets, n, half_dim = sub_keys_2HnC.shape
    set_H1 = torch.arange(ids_THK.shape[1], device=ids_THK.device)[:, None] % sets
    entry_2THK = torch.stack([set_H1 * n + half for half in PAIRINGS[pairing].sub_keys(ids_THK, n)])
    query_2THC = query_THX.unflatten(-1, (2, -1)).movedim(-2, 0)
    keys_2THKC = torch.stack([k.flatten(0, 1)[e] for k, e in zip(sub_keys_2HnC, entry_2THK, strict=True)])
    scores_THK = torch.einsum("sthc,sthkc->thk", query_2THC, keys_2THKC)
    grad_THK = _WEIGHTING_SLOPES[weighting](grad_weights_THK, scores_THK)
    grad_query = torch.einsum("thk,sthkc->thsc", grad_THK, keys_2THKC).flatten(-2)
    grad_sub_keys = torch.zeros_like(sub_keys_2HnC)
    for grad_HnC, entry_THK, query_THC in zip(grad_sub_keys, entry_2THK, query_2THC, strict=True):
        grad_THKC = grad_THK[..., None] * query_THC[:, :, None]
        grad_HnC.view(-1, half_dim).index_add_(0, entry_THK.flatten(), grad_THKC.flatten(0, 2))
    return grad_query, grad_sub_keys


def _gather(rows: Tensor, ids_TP: Tensor, scales: Tensor | None) -> Tensor:
    """rows[ids], 8-bit rows by their scales, zeros for the id -1; in float32 at least."""
    gathered = reference.select(rows, ids_TP)
    if scales is not None:
        return widened(gathered, reference.select(scales, ids_TP))
    return gathered.to(torch.promote_types(rows.dtype, torch.float32))


def _mix_experts(
    x_TD: Tensor,
    weights_TP: Tensor,
    ids_TP: Tensor,
    rows_NRD: Tensor,
    scales_NR: Tensor | None,
    activation: str,
    row_gradients: bool,
) -> tuple[Tensor, Tensor]:
    """The mixture (T, D), and what enters the neurons: u . x and, if gated, g . x, (T, P, R - 1)."""
    down, up, *gate = _gather(rows_NRD, ids_TP, scales_NR).unbind(-2)
    hidden_TPR = torch.stack([torch.einsum("td,tpd->tp", x_TD, part) for part in (down, *gate)], dim=-1)
    value_TP = (
        hidden_TPR[..., 0] * ACTIVATIONS[activation](hidden_TPR[..., 1])
        if gate
        else ACTIVATIONS[activation](hidden_TPR[..., 0])
    )
    return torch.einsum("tp,tpd->td", value_TP * weights_TP, up).to(x_TD.dtype), hidden_TPR.to(x_TD.dtype)


def _mix_experts_backward(
    grad_y_TD: Tensor,
    weights_TP: Tensor,
    ids_TP: Tensor,
    hidden_TPR: Tensor,
    rows_NRD: Tensor,
    scales_NR: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and weights, and what multiplies grad_y (for v) and x (for u and g) in a row's: (T, P, R)."""
    down, up, *gate = _gather(rows_NRD, ids_TP, scales_NR).unbind(-2)
    act, slope = ACTIVATIONS[activation], _ACTIVATION_SLOPES[activation]
    grad_value_TP = torch.einsum("td,tpd->tp", grad_y_TD, up)  # of weight * value, v aside
    first_TP = hidden_TPR[..., 0].contiguous()
    grad_hidden_TP = grad_value_TP * weights_TP
    if gate:
        gate_TP = hidden_TPR[..., 1].contiguous()
        value_TP = first_TP * act(gate_TP)
        coefficients = [grad_hidden_TP * act(gate_TP), weights_TP * value_TP, slope(grad_hidden_TP * first_TP, gate_TP)]
    else:
        value_TP = act(first_TP)
        coefficients = [slope(grad_hidden_TP, first_TP), weights_TP * value_TP]
    grad_x = torch.einsum("tp,tpd->td", coefficients[0], down)
    if gate:
        grad_x = grad_x + torch.einsum("tp,tpd->td", coefficients[2], gate[0])
    return (
        grad_x.to(grad_y_TD.dtype),
        (grad_value_TP * value_TP).to(weights_TP.dtype),
        torch.stack(coefficients, dim=-1).to(weights_TP.dtype),
    )


def _mix_values(weights_TP: Tensor, ids_TP: Tensor, values_ND: Tensor, row_gradients: bool) -> Tensor:
    return torch.einsum("tp,tpd->td", weights_TP, _gather(values_ND, ids_TP, None).to(weights_TP.dtype))


def _dot_values(x_TD: Tensor, ids_TP: Tensor, values_ND: Tensor, row_gradients: bool) -> Tensor:
    return torch.einsum("td,tpd->tp", x_TD, _gather(values_ND, ids_TP, None).to(x_TD.dtype))


def _mix_values_backward(grad_y_TD: Tensor, weights_TP: Tensor, ids_TP: Tensor, values_ND: Tensor) -> Tensor:
    return _dot_values(grad_y_TD, ids_TP, values_ND, False)


def _of_entries(x_TD: Tensor | None, grad_y_TD: Tensor, coefficients_TPR: Tensor) -> Tensor:
    """What each entry adds to the gradient of its row, (T * P, R, D): of v by grad_y, of u and g by x."""
    vectors = [grad_y_TD] if x_TD is None else [x_TD, grad_y_TD, x_TD][: coefficients_TPR.shape[-1]]
    return torch.einsum("tpr,rtd->tprd", coefficients_TPR, torch.stack(vectors)).flatten(0, 1)


def _row_gradients(
    x_TD: Tensor | None, grad_y_TD: Tensor, ids_TP: Tensor, coefficients_TPR: Tensor, num_rows: int
) -> Tensor:
    """The gradient of all rows, (num_rows, R, D)."""
    ids, entries = ids_TP.flatten(), _of_entries(x_TD, grad_y_TD, coefficients_TPR)
    hole = may_have_holes(ids)
    grad = grad_y_TD.new_zeros(num_rows + hole, coefficients_TPR.shape[-1], grad_y_TD.shape[-1])
    grad.index_add_(0, torch.where(ids == -1, num_rows, ids) if hole else ids, entries)
    return grad[:num_rows].clone() if hole else grad


def _gradients_by_row(
    x_TD: Tensor | None, grad_y_TD: Tensor, ids_TP: Tensor, coefficients_TPR: Tensor, num_rows: int
) -> tuple[Tensor, Tensor]:
    """The rows that occur, ascending, and their gradients (U, R, D)."""
    found_U, place_TP = ids_TP.unique(return_inverse=True)
    gradients = _row_gradients(x_TD, grad_y_TD, place_TP, coefficients_TPR, len(found_U))
    named = slice(int(bool((found_U[:1] == -1).any())), None)
    return found_U[named], gradients[named]


KERNELS: dict[str, Callable[..., object]] = {
    "linear": F.linear,
    "retrieve": reference.retrieve,
    "retrieve_backward": _retrieve_backward,
    "mix_experts": _mix_experts,
    "mix_experts_backward": _mix_experts_backward,
    "mix_values": _mix_values,
    "mix_values_backward": _mix_values_backward,
    "dot_values": _dot_values,
    "row_gradients": _row_gradients,
    "gradients_by_row": _gradients_by_row,
}
PEERLM.implement(KERNELS, "CompositeExplicitAutograd")
