"""Single-neuron experts, backward: what belongs to tokens, token by token.

That is the gradients of x and of the weights, and the coefficients of rows' gradients, which `row_gradients.py` sums.
Rows are asked for ahead, as in `experts.py`. Shape suffixes as in `ops/reference.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peerlm.ops.triton.experts import load_hidden, neuron
from peerlm.ops.triton.gather import (
    dots,
    is_held_whole,
    load_ids,
    load_scales,
    load_token,
    load_vectors,
    tile_of_entries,
)
from peerlm.ops.triton.values import dot_rows, sum_rows

_BLOCK = 1024


@triton.jit
def _through_neurons(
    grad, weights, hidden, grad_weights, coefficients, entry, is_entry, R: tl.constexpr, ACTIVATION: tl.constexpr
):
    """From grad_y . v to the gradients of what enters the neurons; writes those of weights, and the coefficients.

    Returns the gradients of u . x and, if gated, g . x.
    """
    weight = tl.load(weights + entry, mask=is_entry, other=0.0)
    first, gate = load_hidden(hidden, entry, is_entry, R)
    value, activated, slope = neuron(first, gate, R, ACTIVATION)
    upstream = weight * grad
    grad_gate = upstream * first * slope
    grad_first = upstream * (activated if R == 3 else slope)
    tl.store(grad_weights + entry, value * grad, mask=is_entry)
    tl.store(coefficients + entry * R, grad_first, mask=is_entry)
    tl.store(coefficients + entry * R + 1, weight * value, mask=is_entry)
    if R == 3:
        tl.store(coefficients + entry * R + 2, grad_gate, mask=is_entry)
    return grad_first, grad_gate


@triton.jit(do_not_specialize=["num_rows"])
def _mix_backward(
    grad_y,
    weights,
    ids,
    hidden,
    rows,
    scales,
    grad_x,
    grad_weights,
    coefficients,
    num_rows,
    ACTIVATION: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    grad_y_D = load_token(grad_y, token, d, D)
    weights += token * P
    ids += token * P
    hidden += token * P * (R - 1)
    grad_weights += token * P
    coefficients += token * P * R
    total = tl.zeros([TILE, BLOCK_D], tl.float32)
    entry, is_entry, row, is_row = load_ids(ids, 0, num_rows, P, TILE)
    u = load_vectors(rows, row, is_row, 0, d, R, D)
    v = load_vectors(rows, row, is_row, 1, d, R, D)
    g = load_vectors(rows, row, is_row, 2, d, R, D) if R == 3 else u
    for start in range(0, P, TILE):
        next_entry, next_is_entry, next_row, next_is_row = load_ids(ids, start + TILE, num_rows, P, TILE)
        next_u = load_vectors(rows, next_row, next_is_row, 0, d, R, D)
        next_v = load_vectors(rows, next_row, next_is_row, 1, d, R, D)
        next_g = load_vectors(rows, next_row, next_is_row, 2, d, R, D) if R == 3 else next_u
        grad = dots(v, grad_y_D, load_scales(scales, row, is_row, 1, R))
        grad_first, grad_gate = _through_neurons(
            grad, weights, hidden, grad_weights, coefficients, entry, is_entry, R, ACTIVATION
        )
        factor = grad_first * load_scales(scales, row, is_row, 0, R)
        total += tl.where(is_entry, factor, 0.0)[:, None] * u.to(tl.float32)
        if R == 3:
            factor = grad_gate * load_scales(scales, row, is_row, 2, R)
            total += tl.where(is_entry, factor, 0.0)[:, None] * g.to(tl.float32)
        entry, is_entry, row, is_row = next_entry, next_is_entry, next_row, next_is_row
        u, v, g = next_u, next_v, next_g
    tl.store(grad_x + token * D + d, tl.sum(total, axis=0), mask=d < D)


@triton.jit(do_not_specialize=["entries"])
def _through_all_neurons(
    grads,
    weights,
    hidden,
    grad_weights,
    coefficients,
    entries,
    R: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_entry = entry < entries
    grad = tl.load(grads + entry, mask=is_entry, other=0.0)
    _through_neurons(grad, weights, hidden, grad_weights, coefficients, entry, is_entry, R, ACTIVATION)


def through_neurons(
    grads: Tensor,
    weights: Tensor,
    hidden: Tensor,
    grad_weights: Tensor,
    coefficients: Tensor,
    parts: int,
    activation: str,
) -> None:
    """Write grad_weights (T, P) and coefficients (T, P, R), of grads = grad_y . v (T, P) and hidden (T, P, R - 1)."""
    entries = grads.numel()
    if entries:
        _through_all_neurons[(triton.cdiv(entries, _BLOCK),)](
            grads, weights, hidden, grad_weights, coefficients, entries, parts, activation, _BLOCK
        )


def mix_experts_backward(
    grad_y: Tensor,
    weights: Tensor,
    ids: Tensor,
    hidden: Tensor,
    rows: Tensor,
    scales: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and weights, and what multiplies grad_y (for v) and x (for u and g) in a row's: (T, P, R).

    All float32. Where an id is not in -1 .. N - 1, the gradients of its token and weight are NaN.
    """
    tokens, per_token = ids.shape
    num_rows, parts, dim = rows.shape
    grad_y, weights, rows = grad_y.detach(), weights.detach(), rows.detach()
    grad_weights, coefficients = torch.zeros_like(weights), weights.new_zeros(tokens, per_token, parts)
    if not is_held_whole(dim):
        grads = dot_rows(grad_y, ids, rows, scales, first=1, step=parts, places=1)
        through_neurons(grads, weights, hidden, grad_weights, coefficients, parts, activation)
        return sum_rows(coefficients, ids, rows, scales, first=0, step=2), grad_weights, coefficients
    grad_x = torch.empty_like(grad_y)
    tile, block_d, warps = tile_of_entries(rows)
    if tokens:
        _mix_backward[(tokens,)](
            grad_y,
            weights,
            ids,
            hidden,
            rows,
            scales,
            grad_x,
            grad_weights,
            coefficients,
            num_rows,
            activation,
            per_token,
            parts,
            dim,
            tile,
            block_d,
            num_warps=warps,
        )
    return grad_x, grad_weights, coefficients
