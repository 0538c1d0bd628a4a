"""Tokens to the ranks that hold their rows and results back, where columns are cut, and rows too where they are.

Inner products travel in place of activations: each rank has its columns of all tokens' inputs, and gives partial inner
products; a token's own rank applies activation and weight, and each rank mixes its columns by what that gives. Shape
suffixes: t tokens of a rank, T of all R x C ranks, rank by rank; P entries per token; D columns, E = D / C of a rank;
V vectors per row; I = V - 1 of them that meet the input.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peerlm.ops.functions import ACTIVATIONS
from peerlm.ops.operators import PEERLM
from peerlm.parallel.place import Place

if TYPE_CHECKING:
    from peerlm.parallel.table import ShardedTable


def mix_columns(
    table: "ShardedTable", weights_tP: Tensor | None, ids_TP: Tensor, x_tD: Tensor | None, activation: str
) -> Tensor:
    """As `Table.mix` (t, D), or without weights as `Table.dot` (t, P); ids are this rank's numbers, -1 for others'.

    Raises:
        ValueError: rows that are not float32 or bfloat16.
    """
    if table.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"rows are {table.dtype}; where columns are cut they must be float32 or bfloat16")

    def compute(rows: Tensor, row_gradients: bool) -> Tensor:
        return _Columns.apply(table.place, row_gradients, activation, ids_TP, weights_tP, x_tD, rows)

    return table._look_up(ids_TP, compute)


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        place: Place,
        row_gradients: bool,
        activation: str,
        ids_TP: Tensor,
        weights_tP: Tensor | None,
        x_tD: Tensor | None,
        rows: Tensor,
    ) -> Tensor:
        ctx.place, ctx.row_gradients, ctx.activation = place, row_gradients, activation
        flat, vectors = rows.detach().reshape(-1, rows.shape[-1]), rows.shape[1] if rows.ndim == 3 else 1
        x_TE, dots_tPI, factors_TP = None, None, None
        if x_tD is not None:
            x_TE = _columns_of_all(place, x_tD.float())
            entering = [v for v in range(vectors) if v != 1]
            dots = [PEERLM.ops.dot_values(x_TE, _vector(ids_TP, vectors, v), flat, False) for v in entering]
            dots_tPI = _sum_at_owner(place, torch.stack(dots, dim=-1))
        if weights_tP is None:
            assert dots_tPI is not None
            y = dots_tPI[..., 0]
        else:
            factors_TP = _of_all(place, _factors(weights_tP, dots_tPI, activation))
            leaving = _vector(ids_TP, vectors, min(1, vectors - 1))
            y = _whole_at_owner(place, PEERLM.ops.mix_values(factors_TP, leaving, flat, False))
            y = y.to(rows.dtype if x_tD is None else x_tD.dtype)
        ctx.save_for_backward(ids_TP, weights_tP, x_TE, dots_tPI, factors_TP, rows)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ids_TP, weights_tP, x_TE, dots_tPI, factors_TP, rows = ctx.saved_tensors
        place: Place = ctx.place
        flat, vectors = rows.detach().reshape(-1, rows.shape[-1]), rows.shape[1] if rows.ndim == 3 else 1
        grad = grad.float() / place.world
        grad_weights: Tensor | None = None
        grad_x: Tensor | None = None
        grad_TE: Tensor | None = None
        coefficients: list[Tensor] = []
        grad_dots_tPI: Tensor | None = None
        if weights_tP is None:
            grad_dots_tPI = grad[..., None]
        else:
            grad_TE = _columns_of_all(place, grad)
            leaving = _vector(ids_TP, vectors, min(1, vectors - 1))
            grad_factors_tP = _sum_at_owner(place, PEERLM.ops.dot_values(grad_TE, leaving, flat, False))
            with torch.enable_grad():
                leaves = [weights_tP.detach().requires_grad_()]
                if dots_tPI is not None:
                    leaves.append(dots_tPI.detach().requires_grad_())
                factors = _factors(leaves[0], leaves[1] if len(leaves) > 1 else None, ctx.activation)
            grad_weights, *rest = torch.autograd.grad(factors, leaves, grad_factors_tP.to(factors.dtype))
            grad_weights = grad_weights * place.world
            coefficients = [factors_TP]
            grad_dots_tPI = rest[0] if rest else None
        if x_TE is not None:
            assert grad_dots_tPI is not None
            grad_dots_TPI = _of_all(place, grad_dots_tPI)
            entering = [v for v in range(vectors) if v != 1]
            parts = [
                PEERLM.ops.mix_values(grad_dots_TPI[..., i].contiguous(), _vector(ids_TP, vectors, v), flat, False)
                for i, v in enumerate(entering)
            ]
            grad_x = _whole_at_owner(place, torch.stack(parts).sum(0)) * place.world
            first, *gate = grad_dots_TPI.unbind(-1)
            coefficients = [first, *coefficients, *gate]
        grad_rows = None
        if ctx.needs_input_grad[6]:
            out = x_TE if grad_TE is None else grad_TE
            grad_rows = PEERLM.gradient_of_rows(
                x_TE if vectors > 1 else None,
                out.contiguous(),
                ids_TP.contiguous(),
                torch.stack(coefficients, dim=-1).float().contiguous(),
                rows,
                by_row=ctx.row_gradients,
            )
        return None, None, None, None, grad_weights, grad_x, grad_rows


def _vector(ids_TP: Tensor, vectors: int, vector: int) -> Tensor:
    """Numbers of one vector of each row, among the vectors of all rows; holes stay holes."""
    return torch.where(ids_TP < 0, ids_TP, ids_TP * vectors + vector).contiguous()


def _factors(weights_tP: Tensor, dots_tPI: Tensor | None, activation: str) -> Tensor:
    """What the vectors that leave the neurons are multiplied by: weight * what the neuron puts out, float32."""
    if dots_tPI is None:
        return weights_tP.float()
    first, *gate = dots_tPI.unbind(-1)
    value = first * ACTIVATIONS[activation](gate[0]) if gate else ACTIVATIONS[activation](first)
    return weights_tP.float() * value


def _columns_of_all(place: Place, x_tD: Tensor) -> Tensor:
    """This rank's columns of all tokens: (t, D) -> (T, E)."""
    slices = x_tD.unflatten(1, (place.cols.size, -1)).transpose(0, 1).flatten(0, 1)
    return place.rows.gather(place.cols.swap(slices))


def _whole_at_owner(place: Place, partial_TE: Tensor) -> Tensor:
    """Of this rank's tokens all columns, summed over the ranks that have rows of theirs: (T, E) -> (t, D)."""
    own = place.cols.swap(place.rows.reduce(partial_TE))
    return own.unflatten(0, (place.cols.size, -1)).transpose(0, 1).flatten(1)


def _of_all(place: Place, values: Tensor) -> Tensor:
    """Numbers of entries of all tokens: (t, ...) -> (T, ...)."""
    return place.rows.gather(place.cols.gather(values))


def _sum_at_owner(place: Place, partial: Tensor) -> Tensor:
    """Sums over all ranks of numbers of this rank's entries: (T, ...) -> (t, ...)."""
    return place.cols.reduce(place.rows.reduce(partial))
