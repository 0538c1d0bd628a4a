"""Stale rows brought up to date on a GPU: looked-up entries claim their rows, and each row is changed once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peerlm.ops.row_updates import CatchUpRules, RowState, RowStep
from peerlm.ops.triton.row_arithmetic import (
    BETA1,
    BETA2,
    CATCH_UP_KEY,
    LOG_BETA1,
    LOG_BETA2,
    PRECISE,
    STEP,
    decay_since,
    numbers_of,
    random_words,
    row_key,
    row_length,
    send,
    store_rounded,
    tile,
)

_ENTRIES = 512
"""Entries that a program claims rows for."""
_PROGRAMS = 4096
"""Programs that share the rows that were claimed: how many these are, only the device knows."""
_NODES = tl.constexpr(8)
_DECAY = tl.constexpr(16)
_NUM_NODES = tl.constexpr(17)
_WIDTH = tl.constexpr(20)


def rows_behind(table: RowState, ids: Tensor | None, now: int) -> Tensor:
    """As `row_step.rows_behind`; waits for the device, which `catch_up_entries` does not."""
    assert table.weights_step is not None
    if ids is None:
        return (table.weights_step < now).nonzero().flatten()
    ids = ids.flatten()
    ids = ids[ids >= 0]
    return ids[table.weights_step[ids] < now].unique()


def catch_up_rows(table: RowState, ids: Tensor, rules: CatchUpRules, step: RowStep) -> None:
    """As `row_step.catch_up_rows`."""
    catch_up_entries(table, ids, place_rules(rules, step.eps, table.rows.device), step)


def place_rules(
    rules: CatchUpRules, eps: float, device: torch.device, into: Tensor | None = None, *, most: int = 0
) -> Tensor:
    """Rules on a device, float32, where kernels find them by step; in a new tensor, or at the start of an earlier one.

    A new one has room for `most` steps at least.

    Line 0 says for which step the first rule is, in four words of 12 bits, and line 1 + i is the rule for the i-th
    step from there: 8 weights, 8 nodes times eps, 1 - P(s, t), and how many nodes count.
    """
    lines = torch.zeros(1 + len(rules.index), _WIDTH.value)
    words = [(rules.first_step >> shift) & 0xFFF for shift in (0, 12, 24)]
    lines[0, :3] = torch.tensor(words, dtype=torch.float32)
    known = rules.index >= 0
    which = rules.index[known].long()
    nodes = rules.nodes.shape[1]
    used = torch.arange(nodes) < rules.num_nodes[which, None]
    found = torch.zeros(len(which), _WIDTH.value)
    found[:, :nodes] = torch.where(used, rules.weights[which], 0.0)
    found[:, _NODES.value : _NODES.value + nodes] = rules.nodes[which] * eps
    found[:, _DECAY.value] = rules.decay[which].float()
    found[:, _NUM_NODES.value] = rules.num_nodes[which].float()
    lines[1:][known] = found
    if into is None:
        into = torch.zeros(1 + max(most, len(rules.index)), _WIDTH.value, device=device)
    return send(lines, device, into)


def catch_up_entries(table: RowState, ids: Tensor | None, rules: Tensor, step: RowStep) -> None:
    """Bring the rows that entries name up to date; no host learns how many these are.

    Args:
        table: updated in place; not of lazy mode.
        ids: int64, any shape, repetitions allowed; None for all rows.
        rules: of `place_rules`, with one for each step at which a row of `ids` may have been right last.
        step: `step.step` is the present step; its learning rate and weight decay are not used.
    """
    assert table.weights_step is not None
    assert table.moments_step is not None
    num_rows, length = len(table.rows), row_length(table)
    entries = num_rows if ids is None else ids.numel()
    if entries == 0:
        return
    device = table.rows.device
    numbers = numbers_of(step, device)
    most = min(entries, num_rows)
    found = torch.empty(2, most, dtype=torch.int32, device=device)
    count = torch.zeros(1, dtype=torch.int32, device=device)
    with torch.cuda.device_of(table.rows):
        _claim_rows[(triton.cdiv(entries, _ENTRIES),)](
            table.weights_step,
            None if ids is None else ids.contiguous(),
            numbers,
            found,
            count,
            entries,
            num_rows,
            most,
            BLOCK=_ENTRIES,
            num_warps=4,
        )
        block, warps = tile(length)
        scales = table.scales
        _catch_up[(min(most, _PROGRAMS),)](
            None if scales is not None else table.rows,
            scales,
            table.exp_avg,
            table.exp_avg_sq,
            table.moments_step,
            found,
            count,
            most,
            rules,
            numbers,
            table.names,
            LEN=length,
            VECTORS=1 if scales is None else scales.shape[1:].numel(),
            BLOCK=block,
            ROW_WISE=table.exp_avg_sq.ndim == 1,
            RANDOM=step.seed is not None,
            num_warps=warps,
            **PRECISE,
        )


@triton.jit(do_not_specialize=["entries", "num_rows", "most"])
def _claim_rows(weights_step, ids, numbers, found, count, entries, num_rows, most, BLOCK: tl.constexpr):
    """List each stale row once, with the step up to which it is right, and mark it as up to date.

    Of the entries that name a row one gets the old step; which one changes no result, nor does the order of the list.
    """
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = entry
    if ids is not None:
        row = tl.load(ids + entry, mask=entry < entries, other=-1)
    inside = (entry < entries) & (row >= 0) & (row < num_rows)
    now = tl.zeros([BLOCK], tl.int32) + tl.load(numbers + STEP).to(tl.int32)
    stale = inside & (tl.load(weights_step + row, mask=inside, other=0) < now)
    since = tl.atomic_xchg(weights_step + row, now, mask=stale)
    claimed = stale & (since < now)
    one = claimed.to(tl.int32)
    place = tl.atomic_add(count, tl.sum(one, 0)) + tl.cumsum(one, 0) - 1
    tl.store(found + place, row.to(tl.int32), mask=claimed)
    tl.store(found + most.to(tl.int64) + place, since, mask=claimed)


@triton.jit(do_not_specialize=["most"])
def _catch_up(
    rows,
    scales,
    exp_avg,
    exp_avg_sq,
    moments_step,
    found,
    count,
    most,
    rules,
    numbers,
    names,
    LEN: tl.constexpr,
    VECTORS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_WISE: tl.constexpr,
    RANDOM: tl.constexpr,
):
    """The rows of the list, shared among programs. Those of 8 bits, without momentum, decay by their scales alone."""
    first_step = tl.load(rules).to(tl.int32)
    first_step += (tl.load(rules + 1).to(tl.int32) << 12) + (tl.load(rules + 2).to(tl.int32) << 24)
    total = tl.load(count)
    for place in range(tl.program_id(0), total, tl.num_programs(0)):
        row = tl.load(found + place).to(tl.int64)
        since = tl.load(found + most.to(tl.int64) + place)
        rule = rules + (since - first_step + 1).to(tl.int64) * _WIDTH
        decay = tl.load(rule + _DECAY)
        if scales is not None:
            for vector in tl.static_range(VECTORS):
                scale = tl.load(scales + row * VECTORS + vector)
                tl.store(scales + row * VECTORS + vector, scale - scale * decay)
        else:
            num_nodes = 0
            if exp_avg is not None:
                moments = tl.load(moments_step + row)
                num_nodes = tl.load(rule + _NUM_NODES).to(tl.int32)
                num_nodes = tl.where(moments == 0, 0, num_nodes)
                decay1 = decay_since(numbers, BETA1, LOG_BETA1, since - moments)
                decay2 = decay_since(numbers, BETA2, LOG_BETA2, since - moments)
            if (num_nodes > 0) | (decay != 0.0):
                key = row_key(numbers, CATCH_UP_KEY, row, names)
                for first in range(0, LEN, BLOCK):
                    column = first + tl.arange(0, BLOCK)
                    mask = column < LEN
                    at = row * LEN + column
                    weight = tl.load(rows + at, mask=mask, other=0.0).to(tl.float32)
                    change = weight * decay
                    if exp_avg is not None:  # noqa: SIM102 -- known to the compiler, which leaves out what follows
                        if num_nodes > 0:
                            momentum = tl.load(exp_avg + at, mask=mask, other=0.0).to(tl.float32) * decay1
                            if ROW_WISE:
                                second = tl.zeros([BLOCK], tl.float32) + tl.load(exp_avg_sq + row)
                            else:
                                second = tl.load(exp_avg_sq + at, mask=mask, other=0.0).to(tl.float32)
                            root = tl.sqrt_rn(second * decay2)
                            factor = tl.zeros([BLOCK], tl.float32)
                            for node in range(num_nodes):
                                factor += tl.div_rn(tl.load(rule + node), root + tl.load(rule + _NODES + node))
                            change += momentum * factor
                    noise = random_words(key, column) & 0xFFFF
                    store_rounded(rows + at, weight - change, noise, mask, RANDOM)
