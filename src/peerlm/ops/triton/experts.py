"""Single-neuron experts, forward: act(u . x) v, or (u . x) act(g . x) v, summed by weight.

One program has one token. It asks for u, v and g of the next experts before it computes with those that it has:
compilers else ask for v once u has been used. Rows too wide for that are read part by part. A token's sum is that of
the sums of groups of its entries, in order; where tokens are few, each group has a program of its own, and results have
the same bits. Shape suffixes as in `ops/reference.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peerlm.ops.triton.activations import activate
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
_FEW_TOKENS = 128
"""About as many as a GPU has multiprocessors: with one program each they would wait for rows most of the time."""
_MOST_GROUPS = 16


@triton.jit
def neuron(first, gate, R: tl.constexpr, ACTIVATION: tl.constexpr):
    """What a neuron makes of u . x and, if gated, g . x: its value, that of its activation, and the latter's slope."""
    activated, slope = activate(gate if R == 3 else first, ACTIVATION)
    return first * activated if R == 3 else activated, activated, slope


@triton.jit
def load_hidden(hidden, entry, is_entry, R: tl.constexpr):
    """What enters the neurons of entries: u . x and, if gated, g . x, else u . x again; hidden (T, P, R - 1)."""
    first = tl.load(hidden + entry * (R - 1), mask=is_entry, other=0.0)
    gate = first
    if R == 3:
        gate = tl.load(hidden + entry * 2 + 1, mask=is_entry, other=0.0)
    return first, gate


@triton.jit(do_not_specialize=["num_rows"])
def _mix(
    x,
    weights,
    ids,
    rows,
    scales,
    hidden,
    y,
    num_rows,
    ACTIVATION: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Grid (T,), y (T, D); or, if SPLIT, grid (T, groups), y (T, groups, D): sums of GROUP entries each."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    x_D = load_token(x, token, d, D)
    weights += token * P
    ids += token * P
    hidden += token * P * (R - 1)
    first_entry = 0
    last_entry = P
    place = token
    if SPLIT:
        first_entry = tl.program_id(1) * GROUP
        last_entry = tl.minimum(first_entry + GROUP, P)
        place = token * tl.num_programs(1) + tl.program_id(1)
    y_D = tl.zeros([BLOCK_D], tl.float32)
    entry, is_entry, row, is_row = load_ids(ids, first_entry, num_rows, P, TILE)
    u = load_vectors(rows, row, is_row, 0, d, R, D)
    v = load_vectors(rows, row, is_row, 1, d, R, D)
    g = load_vectors(rows, row, is_row, 2, d, R, D) if R == 3 else u
    for group in range(first_entry, last_entry, GROUP):
        total = tl.zeros([TILE, BLOCK_D], tl.float32)
        for start in range(group, tl.minimum(group + GROUP, P), TILE):
            next_entry, next_is_entry, next_row, next_is_row = load_ids(ids, start + TILE, num_rows, P, TILE)
            next_u = load_vectors(rows, next_row, next_is_row, 0, d, R, D)
            next_v = load_vectors(rows, next_row, next_is_row, 1, d, R, D)
            next_g = load_vectors(rows, next_row, next_is_row, 2, d, R, D) if R == 3 else next_u
            weight = tl.load(weights + entry, mask=is_entry, other=0.0)
            first = dots(u, x_D, load_scales(scales, row, is_row, 0, R))
            gate = first
            tl.store(hidden + entry * (R - 1), first, mask=is_entry)
            if R == 3:
                gate = dots(g, x_D, load_scales(scales, row, is_row, 2, R))
                tl.store(hidden + entry * 2 + 1, gate, mask=is_entry)
            value, _, _ = neuron(first, gate, R, ACTIVATION)
            factor = weight * value * load_scales(scales, row, is_row, 1, R)
            total += tl.where(is_entry, factor, 0.0)[:, None] * v.to(tl.float32)
            entry, is_entry, row, is_row = next_entry, next_is_entry, next_row, next_is_row
            u, v, g = next_u, next_v, next_g
        y_D += tl.sum(total, axis=0)
    tl.store(y + place * D + d, y_D, mask=d < D)


@triton.jit
def _add_groups(sums, y, GROUPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The last pass of few tokens: sums (T, GROUPS, D) -> y (T, D), in the order in which one program adds them."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    y_D = tl.zeros([BLOCK_D], tl.float32)
    for group in tl.static_range(GROUPS):
        y_D += tl.load(sums + (token * GROUPS + group) * D + d, mask=d < D, other=0.0)
    tl.store(y + token * D + d, y_D, mask=d < D)


@triton.jit(do_not_specialize=["entries"])
def _weigh_neurons(weights, hidden, weighted, entries, R: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """Weighted (E,) = weight * what the neuron puts out."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_entry = entry < entries
    first, gate = load_hidden(hidden, entry, is_entry, R)
    value, _, _ = neuron(first, gate, R, ACTIVATION)
    tl.store(weighted + entry, tl.load(weights + entry, mask=is_entry, other=0.0) * value, mask=is_entry)


def weigh_neurons(weights: Tensor, hidden: Tensor, weighted: Tensor, parts: int, activation: str) -> None:
    """Write weighted = weight * what the neuron puts out, for weights (T, P) and hidden (T, P, R - 1)."""
    entries = weights.numel()
    if entries:
        _weigh_neurons[(triton.cdiv(entries, _BLOCK),)](weights, hidden, weighted, entries, parts, activation, _BLOCK)


def mix_experts(
    x: Tensor, weights: Tensor, ids: Tensor, rows: Tensor, scales: Tensor | None, activation: str, row_gradients: bool
) -> tuple[Tensor, Tensor]:
    """The mixture (T, D), and what enters the neurons: u . x and, if gated, g . x, (T, P, R - 1); both float32.

    A token with an id that is not in -1 .. N - 1 gets NaN: the device is not asked, and nothing out of range is read.
    """
    tokens, per_token = ids.shape
    num_rows, parts, dim = rows.shape
    x, weights, rows = x.detach(), weights.detach(), rows.detach()
    if not is_held_whole(dim):
        hidden = dot_rows(x, ids, rows, scales, first=0, step=2, places=parts - 1)
        weighted = torch.empty_like(weights)
        weigh_neurons(weights, hidden, weighted, parts, activation)
        return sum_rows(weighted[..., None], ids, rows, scales, first=1, step=parts), hidden
    y, hidden = torch.empty_like(x), x.new_zeros(tokens, per_token, parts - 1)
    tile, block_d, warps = tile_of_entries(rows)
    group = max(16, 2 * tile, tile * triton.cdiv(per_token, tile * _MOST_GROUPS))
    groups = triton.cdiv(per_token, group)
    split = tokens <= _FEW_TOKENS and groups > 1
    sums = x.new_empty(tokens, groups, dim) if split else y
    if y.numel():
        _mix[(tokens, groups) if split else (tokens,)](
            x,
            weights,
            ids,
            rows,
            scales,
            hidden,
            sums,
            num_rows,
            activation,
            per_token,
            parts,
            dim,
            tile,
            block_d,
            group,
            split,
            num_warps=warps,
        )
        if split:
            block = min(block_d, 256)
            _add_groups[(tokens, triton.cdiv(dim, block))](sums, y, groups, dim, block, num_warps=1)
    return y, hidden
