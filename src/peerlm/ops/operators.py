"""The operators `torch.ops.peerlm.*`: schemas, fakes for tracing and autograd formulas, the same for every device.

A backend with kernels registers them for a dispatch key (`Operators.implement`); torch.compile, torch.export and
gradient checkpointing then take models that use them. Shape suffixes as in `reference.py`.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from peerlm.ops.padded_rows import pad
from peerlm.ops.row_formats import SCALED_DTYPES
from peerlm.ops.row_updates import RowState, RowStep, fused_row_update
from peerlm.ops.tensors import has_values, is_fake

FusedUpdate = Callable[[RowState, RowStep, Tensor | None, Tensor, Tensor, Tensor], None]
"""Takes a table, its step, and x, grad_y, ids and coefficients as `row_gradients` does; updates the rows that occur."""
PaddedGradients = Callable[[Tensor | None, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""As `row_gradients`, but ids (S,) and gradients (S, R, D) of the rows that occur, then -1 and zeros; S is known."""


# The product x W^T


def _linear_fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _linear_save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


# Retrieval


def _retrieve_fake(
    query: Tensor, sub_keys: Tensor, k: int, weighting: str, pairing: str = "row-major"
) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], query.shape[1], k)
    return query.new_empty(shape), query.new_empty(shape, dtype=torch.int64)


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


# Mixing of experts


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


# Mixing of values, and inner products with them


def _mix_values_fake(weights: Tensor, ids: Tensor, values: Tensor, row_gradients: bool) -> Tensor:
    return weights.new_empty(weights.shape[0], values.shape[1])


def _mix_values_backward_fake(grad_y: Tensor, weights: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    return torch.empty_like(weights)


def _mix_values_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, ids, values, ctx.row_gradients = inputs
    ctx.save_for_backward(weights, ids, values)


def _dot_values_fake(x: Tensor, ids: Tensor, values: Tensor, row_gradients: bool) -> Tensor:
    return x.new_empty(ids.shape)


def _dot_values_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ids, values, ctx.row_gradients = inputs
    ctx.save_for_backward(x, ids, values)


# Gradients of rows


def _row_gradients_fake(x: Tensor | None, grad_y: Tensor, ids: Tensor, coefficients: Tensor, num_rows: int) -> Tensor:
    return grad_y.new_empty(num_rows, coefficients.shape[-1], grad_y.shape[-1])


def _gradients_by_row_fake(
    x: Tensor | None, grad_y: Tensor, ids: Tensor, coefficients: Tensor, num_rows: int
) -> tuple[Tensor, Tensor]:
    occur = torch.library.get_ctx().new_dynamic_size()
    return ids.new_empty(occur), grad_y.new_empty(occur, coefficients.shape[-1], grad_y.shape[-1])


def _refuse_second_derivatives(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("these kernels are differentiable once only; backend 'reference' is twice")


_ONCE_ONLY = ("retrieve_backward", "mix_experts_backward", "mix_values_backward", "row_gradients", "gradients_by_row")
_SCHEMAS: tuple[tuple[str, Callable[..., Any]], ...] = (
    ("linear(Tensor x, Tensor weight) -> Tensor", _linear_fake),
    (
        "retrieve(Tensor query, Tensor sub_keys, int k, str weighting, str pairing='row-major') -> (Tensor, Tensor)",
        _retrieve_fake,
    ),
    (
        "retrieve_backward(Tensor grad_weights, Tensor weights, Tensor ids, Tensor query, Tensor sub_keys,"
        " str weighting, str pairing='row-major') -> (Tensor, Tensor)",
        _retrieve_backward_fake,
    ),
    (
        "mix_experts(Tensor x, Tensor weights, Tensor ids, Tensor rows, Tensor? scales, str activation,"
        " bool row_gradients) -> (Tensor, Tensor)",
        _mix_experts_fake,
    ),
    (
        "mix_experts_backward(Tensor grad_y, Tensor weights, Tensor ids, Tensor hidden, Tensor rows, Tensor? scales,"
        " str activation) -> (Tensor, Tensor, Tensor)",
        _mix_experts_backward_fake,
    ),
    ("mix_values(Tensor weights, Tensor ids, Tensor values, bool row_gradients) -> Tensor", _mix_values_fake),
    (
        "mix_values_backward(Tensor grad_y, Tensor weights, Tensor ids, Tensor values) -> Tensor",
        _mix_values_backward_fake,
    ),
    ("dot_values(Tensor x, Tensor ids, Tensor values, bool row_gradients) -> Tensor", _dot_values_fake),
    (
        "row_gradients(Tensor? x, Tensor grad_y, Tensor ids, Tensor coefficients, SymInt num_rows) -> Tensor",
        _row_gradients_fake,
    ),
    (
        "gradients_by_row(Tensor? x, Tensor grad_y, Tensor ids, Tensor coefficients, SymInt num_rows)"
        " -> (Tensor, Tensor)",
        _gradients_by_row_fake,
    ),
)


def _on_its_gpu(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that is launched on the GPU of its tensors, which need not be the current one."""

    @wraps(kernel)
    def launched(*arguments: Any) -> Any:
        with torch.cuda.device_of(next(argument for argument in arguments if isinstance(argument, Tensor))):
            return kernel(*arguments)

    return launched


class Operators:
    """The operators of one namespace. Kernels that run on the same device as others need a namespace of their own.

    The methods without an underscore give operators what all kernels may rely on: contiguous tensors, float32 but for
    rows, which keep their dtype; those of 8 bits have scales.
    """

    def __init__(self, namespace: str):
        self._library = torch.library.Library(namespace, "DEF")
        self._fused_updates: dict[str, FusedUpdate] = {}
        self._padded_gradients: dict[str, PaddedGradients] = {}
        self.ops: Any = getattr(torch.ops, namespace)
        for schema, fake in _SCHEMAS:
            self._library.define(schema)
            torch.library.register_fake(f"{namespace}::{schema.partition('(')[0]}", fake, lib=self._library)
        for name, save, gradients in (
            ("linear", _linear_save, self._linear_gradients),
            ("retrieve", _retrieve_save, self._retrieve_gradients),
            ("mix_experts", _mix_experts_save, self._mix_experts_gradients),
            ("mix_values", _mix_values_save, self._mix_values_gradients),
            ("dot_values", _dot_values_save, self._dot_values_gradients),
        ):
            torch.library.register_autograd(f"{namespace}::{name}", gradients, setup_context=save, lib=self._library)
        for name in _ONCE_ONLY:
            torch.library.register_autograd(f"{namespace}::{name}", _refuse_second_derivatives, lib=self._library)

    def implement(self, kernels: Mapping[str, Callable[..., Any]], dispatch_key: str) -> None:
        """Register kernels by operator's name for a dispatch key, as "CPU", "CUDA", or "CompositeExplicitAutograd"."""
        for name, kernel in kernels.items():
            self._library.impl(name, _on_its_gpu(kernel) if dispatch_key == "CUDA" else kernel, dispatch_key)

    def implement_fused_update(self, update: FusedUpdate, device_type: str) -> None:
        """Register what makes a table's step of the row gradients in the backward pass, for a type of device."""
        self._fused_updates[device_type] = update

    def implement_padded_gradients(self, gradients: PaddedGradients, device_type: str) -> None:
        """Register what gives gradients by row without waiting for a type of device, in place of an operator."""
        self._padded_gradients[device_type] = gradients

    def retrieve(
        self, query_THX: Tensor, sub_keys_2HnC: Tensor, k: int, weighting: str, pairing: str = "row-major"
    ) -> tuple[Tensor, Tensor]:
        """As `reference.retrieve`, but differentiable once only; ids are those of float64 scores."""
        query = query_THX.float().contiguous()
        return self.ops.retrieve(query, sub_keys_2HnC.float().contiguous(), k, weighting, pairing)

    def mix_experts(
        self,
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

        With `row_gradients` the gradient of the rows is a sparse tensor of those that occur: coalesced, or padded
        (`padded_rows.pad`) where the kernels do not wait for the device to tell how many these are.
        """
        x, weights = x_TD.float().contiguous(), weights_TP.float().contiguous()
        scales = None if scales_NR is None else scales_NR.contiguous()
        y, _ = self.ops.mix_experts(
            x, weights, ids_TP.contiguous(), rows_NRD.contiguous(), scales, activation, row_gradients
        )
        return y.to(x_TD.dtype)

    def mix_values(
        self, weights_TP: Tensor, ids_TP: Tensor, values_ND: Tensor, *, row_gradients: bool = False
    ) -> Tensor:
        """As `reference.mix_values`, but differentiable once only; `row_gradients` as in `mix_experts`."""
        weights = weights_TP.float().contiguous()
        y = self.ops.mix_values(weights, ids_TP.contiguous(), values_ND.contiguous(), row_gradients)
        return y.to(values_ND.dtype)

    def dot_values(self, x_TD: Tensor, ids_TP: Tensor, values_ND: Tensor, *, row_gradients: bool = False) -> Tensor:
        """As `reference.dot_values`, but differentiable once only, in float32; `row_gradients` as in `mix_experts`."""
        return self.ops.dot_values(
            x_TD.float().contiguous(), ids_TP.contiguous(), values_ND.contiguous(), row_gradients
        )

    def _linear_gradients(self, ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_y = grad_y.contiguous()
        grad_x = self.ops.linear(grad_y, weight.t()) if ctx.needs_input_grad[0] else None
        grad_weight = self.ops.linear(x.t(), grad_y.t()).t() if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight

    def _retrieve_gradients(self, ctx: Any, grad_weights: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_query, grad_sub_keys = self.ops.retrieve_backward(
            grad_weights, *ctx.saved_tensors, ctx.weighting, ctx.pairing
        )
        return grad_query, grad_sub_keys, None, None, None

    def _mix_experts_gradients(self, ctx: Any, grad_y: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return (None,) * 7
        x, weights, ids, hidden, rows, scales = ctx.saved_tensors
        grad_y = grad_y.contiguous()
        grad_x, grad_weights, coefficients = self.ops.mix_experts_backward(
            grad_y, weights, ids, hidden, rows, scales, ctx.activation
        )
        grad_rows = None
        if ctx.needs_input_grad[3] or (ctx.row_gradients and scales is not None):
            grad_rows = self.gradient_of_rows(x, grad_y, ids, coefficients, rows, by_row=ctx.row_gradients)
        return grad_x, grad_weights, None, grad_rows, None, None, None

    def _mix_values_gradients(self, ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        weights, ids, values = ctx.saved_tensors
        grad_y = grad_y.contiguous()
        grad_weights = self.ops.mix_values_backward(grad_y, weights, ids, values)
        grad_values = None
        if ctx.needs_input_grad[2]:
            grad_values = self.gradient_of_rows(None, grad_y, ids, weights[..., None], values, by_row=ctx.row_gradients)
        return grad_weights, None, grad_values, None

    def _dot_values_gradients(self, ctx: Any, grad_dots: Tensor) -> tuple[Tensor | None, ...]:
        x, ids, values = ctx.saved_tensors
        grad_dots = grad_dots.contiguous()
        grad_x = self.ops.mix_values(grad_dots, ids, values, False) if ctx.needs_input_grad[0] else None
        grad_values = None
        if ctx.needs_input_grad[2]:
            grad_values = self.gradient_of_rows(None, x, ids, grad_dots[..., None], values, by_row=ctx.row_gradients)
        return grad_x, None, grad_values, None

    def gradient_of_rows(
        self, x: Tensor | None, grad_y: Tensor, ids: Tensor, coefficients: Tensor, rows: Tensor, *, by_row: bool
    ) -> Tensor | None:
        """Gradient of `rows` in their shape and dtype, dense or sparse; None where an optimizer has used it up."""
        if not by_row:
            grad = self.ops.row_gradients(x, grad_y, ids, coefficients, rows.shape[0])
            return grad.view(rows.shape).to(rows.dtype)
        if not has_values(grad_y):
            if is_fake(grad_y) and fused_row_update(rows) is not None:
                return None  # there are shapes alone
            raise RuntimeError(
                "row_gradients=True gives a gradient by row, which code compiled in one graph cannot: "
                "compile without fullgraph=True, or pass row_gradients=False"
            )
        update_rows = self._fused_updates.get(rows.device.type)
        if update_rows is not None and (update := fused_row_update(rows, ids)) is not None:
            update_rows(*update, x, grad_y, ids, coefficients)
            return None
        if rows.dtype in SCALED_DTYPES:
            raise RuntimeError(f"rows in {rows.dtype} have no gradient: they are trained by RowAdamW(fused=True)")
        padded = self._padded_gradients.get(rows.device.type)
        gradients = self.ops.gradients_by_row if padded is None else padded
        found, grad = gradients(x, grad_y, ids, coefficients, rows.shape[0])
        values = grad.view(-1, *rows.shape[1:]).to(rows.dtype)
        if padded is not None:
            return pad(rows, found, values)
        return torch.sparse_coo_tensor(found[None], values, rows.shape, is_coalesced=True, check_invariants=False)


PEERLM = Operators("peerlm")
"""What models use: each device's own kernels."""
