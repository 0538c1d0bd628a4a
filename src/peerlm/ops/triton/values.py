"""Sums of rows by weight, and inner products with rows: memory values, and experts too wide for a program to hold.

Each program has one token, whose result so does not depend on the others. Parts FIRST, FIRST + STEP, ... of each row
take part. Shape suffixes as in `ops/reference.py`.
"""

import triton
import triton.language as tl
from torch import Tensor

from peerlm.ops.triton.gather import load_ids, load_scales, load_token, load_vectors, tile_of_entries


@triton.jit(do_not_specialize=["num_rows"])
def _sum_rows(
    weights,
    ids,
    rows,
    scales,
    y,
    num_rows,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
    PLACES: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write y (T, D): sums of weight * vector; weights (T, P, PLACES), where PLACES is R or, with one part, 1."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    weights += token * P * PLACES
    ids += token * P
    total = tl.zeros([TILE, BLOCK_D], tl.float32)
    for first in range(0, P, TILE):
        entry, is_entry, row, is_row = load_ids(ids, first, num_rows, P, TILE)
        for part in tl.static_range(FIRST, R, STEP):
            vectors = load_vectors(rows, row, is_row, part, d, R, D).to(tl.float32)
            place = entry * PLACES + (part if PLACES == R else 0)
            weight = tl.load(weights + place, mask=is_entry, other=0.0) * load_scales(scales, row, is_row, part, R)
            total += tl.where(is_entry, weight, 0.0)[:, None] * vectors
    tl.store(y + token * D + d, tl.sum(total, axis=0), mask=d < D)


@triton.jit(do_not_specialize=["num_rows"])
def _dot_rows(
    x,
    ids,
    rows,
    scales,
    products,
    num_rows,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
    PLACES: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write products (T, P, PLACES): x . vector, of as many parts as there are places."""
    token = tl.program_id(0).to(tl.int64)
    ids += token * P
    products += token * P * PLACES
    for first in range(0, P, TILE):
        entry, is_entry, row, is_row = load_ids(ids, first, num_rows, P, TILE)
        for place in tl.static_range(PLACES):
            part = FIRST + place * STEP
            total = tl.zeros([TILE, BLOCK_D], tl.float32)
            for block in range(0, D, BLOCK_D):
                d = block + tl.arange(0, BLOCK_D)
                total += (
                    load_vectors(rows, row, is_row, part, d, R, D).to(tl.float32) * load_token(x, token, d, D)[None, :]
                )
            product = tl.sum(total, axis=1) * load_scales(scales, row, is_row, part, R)
            tl.store(products + entry * PLACES + place, product, mask=is_entry)


def sum_rows(weights: Tensor, ids: Tensor, rows: Tensor, scales: Tensor | None, *, first: int, step: int) -> Tensor:
    """The sum of each token's vectors by weight, (T, D) float32.

    weights: (T, P, R), or (T, P, 1) if `step` is R, so that one part takes part; ids (T, P); rows (N, R, D).
    """
    tokens, per_token = ids.shape
    num_rows, parts, dim = rows.shape
    y = weights.new_empty(tokens, dim)
    tile, block_d, warps = tile_of_entries(rows)
    if y.numel():
        _sum_rows[(tokens, triton.cdiv(dim, block_d))](
            weights,
            ids,
            rows,
            scales,
            y,
            num_rows,
            first,
            step,
            weights.shape[-1],
            per_token,
            parts,
            dim,
            tile,
            block_d,
            num_warps=warps,
        )
    return y


def dot_rows(
    x: Tensor, ids: Tensor, rows: Tensor, scales: Tensor | None, *, first: int, step: int, places: int
) -> Tensor:
    """Inner products of each token with its rows' vectors of `places` parts: x (T, D) -> (T, P, places) float32."""
    tokens, per_token = ids.shape
    num_rows, parts, dim = rows.shape
    products = x.new_zeros(tokens, per_token, places)
    tile, block_d, warps = tile_of_entries(rows)
    if products.numel():
        _dot_rows[(tokens,)](
            x,
            ids,
            rows,
            scales,
            products,
            num_rows,
            first,
            step,
            places,
            per_token,
            parts,
            dim,
            tile,
            block_d,
            num_warps=warps,
        )
    return products


def mix_values(weights: Tensor, ids: Tensor, values: Tensor, row_gradients: bool) -> Tensor:
    """The weighted sum of each token's values: weights (T, P), values (N, D) -> (T, D) float32."""
    return sum_rows(weights.detach()[..., None], ids, values.detach()[:, None], None, first=0, step=1)


def dot_values(x: Tensor, ids: Tensor, values: Tensor, row_gradients: bool) -> Tensor:
    """Inner products of each token with its values: x (T, D), values (N, D) -> (T, P) float32."""
    return dot_rows(x.detach(), ids, values.detach()[:, None], None, first=0, step=1, places=1)[..., 0]


def mix_values_backward(grad_y: Tensor, weights: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    """The gradient of the weights of `mix_values`, (T, P) float32."""
    return dot_values(grad_y, ids, values, False)
