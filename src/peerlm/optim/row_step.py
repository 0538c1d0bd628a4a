"""The definition: AdamW on chosen rows of a table in eager PyTorch, any device.

Native kernels are tested against this file. Arithmetic is in float32, in float64 for float64 tables; what is
kept in bfloat16 or 8 bits is rounded stochastically where a seed is given, because rounding to nearest would swallow
steps below 1/256 of a value. Shape suffixes: U distinct rows of a table, X a row's shape, J nodes.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from peerlm.ops.row_updates import CatchUpRules, RowState, RowStep
from peerlm.optim.scaled_rows import following_scales, narrow

_ELEMENTS_AT_ONCE = 1 << 22


def rows_behind(table: RowState, ids: Tensor | None, now: int) -> Tensor:
    """The distinct rows among ids (int64, any shape), or of all, that are not right up to step `now`; ascending.

    An id of -1 names no row.
    """
    assert table.weights_step is not None
    if ids is None:
        return (table.weights_step < now).nonzero().flatten()
    ids = ids.flatten()
    ids = ids[ids >= 0]
    return ids[table.weights_step[ids] < now].unique()


def update_rows(table: RowState, ids: Tensor | None, gradient_UX: Tensor, step: RowStep) -> None:
    """One AdamW step of the rows that have a gradient (Loshchilov 2019, algorithm 2).

    Moments stored at an earlier step first decay by the steps since. Weights must be right up to step - 1.

    Args:
        table: updated in place.
        ids: (U,) int64, distinct; None for all rows in order.
        gradient_UX: (U, *row_shape).
        step: the numbers of the step.
    """
    for part, ids_U in _parts(table, ids):
        _update(table, ids_U, gradient_UX[part], step)


def _update(table: RowState, ids_U: Tensor, gradient_UX: Tensor, step: RowStep) -> None:
    dtype = arithmetic_dtype(table.rows)
    gradient = gradient_UX.to(dtype).flatten(1)
    rounding = _Rounding(step.seed, 2 * step.step, table, ids_U)
    age_U1 = gradient.new_ones(len(ids_U), 1)
    if table.moments_step is not None:
        age_U1 = (step.step - table.moments_step[ids_U]).to(dtype)[:, None]
        table.moments_step[ids_U] = step.step
    square = gradient.square()
    if not table.by_weight:
        square = square.unflatten(1, (-1, _run(table))).mean(-1)
    v = table.exp_avg_sq[ids_U].to(dtype).view(len(ids_U), -1) * step.beta2**age_U1 + square * (1 - step.beta2)
    _store(table.exp_avg_sq, ids_U, v, rounding.second_moments)
    m = gradient
    if table.exp_avg is not None:
        m = table.exp_avg[ids_U].to(dtype).flatten(1) * step.beta1**age_U1 + gradient * (1 - step.beta1)
        _store(table.exp_avg, ids_U, m, rounding.first_moments)
    denominator = _spread(table, v.sqrt()) / (1 - step.beta2**step.step) ** 0.5 + step.eps
    rate = step.learning_rate / (1 - step.beta1**step.step)
    w = _weights(table, ids_U)
    w = w - (w * (step.learning_rate * step.weight_decay) + rate * m / denominator)
    if table.scales is None:
        _store(table.rows, ids_U, w, rounding.weights)
    else:
        _store_scaled(table.rows, table.scales, ids_U, w, rounding.weights())
    if table.weights_step is not None:
        table.weights_step[ids_U] = step.step


def catch_up_rows(table: RowState, ids: Tensor, rules: CatchUpRules, step: RowStep) -> None:
    """Bring rows up to date: what AdamW would have done to them while their gradients were zero.

    Moments stay as stored; they decay when the row is next updated.

    Args:
        table: updated in place; not of lazy mode.
        ids: (U,) int64, distinct rows whose `weights_step` each has a rule in `rules`.
        rules: of `catch_up_rules`, up to the present step.
        step: `step.step` is the present step; its learning rate and weight decay are not used.
    """
    for _, ids_U in _parts(table, ids):
        _catch_up(table, ids_U, rules, step)


def _catch_up(table: RowState, ids_U: Tensor, rules: CatchUpRules, step: RowStep) -> None:
    assert table.weights_step is not None
    assert table.moments_step is not None
    device = table.rows.device
    dtype = arithmetic_dtype(table.rows)
    since_U = table.weights_step[ids_U]
    rule_U = rules.index.to(device)[since_U.long() - rules.first_step].long()
    if table.scales is not None:  # without momentum: rows decay, which scales do without rounding
        decay_U = rules.decay.to(device, dtype)[rule_U].view(-1, *[1] * (table.scales.ndim - 1))
        table.scales.index_copy_(0, ids_U, table.scales[ids_U] * (1 - decay_U))
        table.weights_step[ids_U] = step.step
        return
    w = _weights(table, ids_U)
    change = w * rules.decay.to(device, dtype)[rule_U, None]
    if table.exp_avg is not None:
        aged_U1 = (since_U - table.moments_step[ids_U]).to(dtype)[:, None]
        m = table.exp_avg[ids_U].to(dtype).flatten(1) * step.beta1**aged_U1
        v = table.exp_avg_sq[ids_U].to(dtype).view(len(ids_U), -1) * step.beta2**aged_U1
        root = _spread(table, v.sqrt())
        num_nodes = int(rules.num_nodes.max())
        weights_UJ = rules.weights[:, :num_nodes].to(device, dtype)[rule_U]
        nodes_UJ = (rules.nodes[:, :num_nodes] * step.eps).to(device, dtype)[rule_U]
        factor = torch.zeros_like(root)
        for weight_U1, node_U1 in zip(weights_UJ.split(1, dim=1), nodes_UJ.split(1, dim=1), strict=True):
            factor += weight_U1 / (root + node_U1)
        change += m * factor
    rounding = _Rounding(step.seed, 2 * step.step + 1, table, ids_U)
    _store(table.rows, ids_U, w - change, rounding.weights)
    table.weights_step[ids_U] = step.step


def _parts(table: RowState, ids: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Pieces of ids small enough that temporaries stay small, and where they stand."""
    if ids is None:
        ids = torch.arange(len(table.rows), device=table.rows.device)
    at_once = max(1, _ELEMENTS_AT_ONCE // max(1, math.prod(table.rows.shape[1:])))
    for start in range(0, len(ids), at_once):
        part = slice(start, start + at_once)
        yield part, ids[part]


def _run(table: RowState) -> int:
    """How many weights of a row share a second moment."""
    return math.prod(table.rows.shape[1:]) // math.prod(table.exp_avg_sq.shape[1:])


def _spread(table: RowState, root: Tensor) -> Tensor:
    """What belongs to second moments (U, R), for each weight of a row, or to be broadcast over these."""
    return root if table.by_weight or root.shape[1] == 1 else root.repeat_interleave(_run(table), dim=1)


def arithmetic_dtype(rows: Tensor) -> torch.dtype:
    """What AdamW computes in: float64 for rows in float64, float32 for all others."""
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def _weights(table: RowState, ids_U: Tensor) -> Tensor:
    """Rows as they count, (U, len)."""
    w = table.rows[ids_U].to(arithmetic_dtype(table.rows))
    return (w if table.scales is None else w * table.scales[ids_U][..., None]).flatten(1)


def _store_scaled(rows: Tensor, scales: Tensor, ids_U: Tensor, value: Tensor, random_bits: Tensor | None) -> None:
    """Store values (U, len) in 8 bits, and the scales that go with them."""
    value = value.view(len(ids_U), *rows.shape[1:])
    following = following_scales(value, scales[ids_U], rows.dtype)
    bits = None if random_bits is None else random_bits.view(value.shape)
    codes = narrow(value, following, rows.dtype, bits)
    scales.index_copy_(0, ids_U, following)
    rows.view(torch.int8).index_copy_(0, ids_U, codes.view(torch.int8))


def _store(target: Tensor, ids_U: Tensor, value: Tensor, random_bits: Callable[[], Tensor | None]) -> None:
    value = value.reshape(len(ids_U), *target.shape[1:])
    if target.dtype == torch.bfloat16:
        bits = random_bits()
        value = value.to(target.dtype) if bits is None else round_stochastically(value, bits.view(value.shape))
    target.index_copy_(0, ids_U, value.to(target.dtype))


def round_stochastically(value: Tensor, random_bits: Tensor) -> Tensor:
    """float32 to bfloat16, up or down with probabilities that make the mean right.

    random_bits: int64 in 0 .. 65535, like value. NaN and infinity stay what they are.
    """
    raised = (value.contiguous().view(torch.int32) + random_bits.to(torch.int32)) & -65536
    return torch.where(value.isfinite(), raised.view(torch.float32), value).to(torch.bfloat16)


_WORD = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


def mix_bits(word: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 (Appleby 2011), 32 bits, in int64."""
    word = (word ^ (word >> 16)) * 0x85EBCA6B & _WORD
    word = (word ^ (word >> 13)) * 0xC2B2AE35 & _WORD
    return word ^ (word >> 16)


class _Rounding:
    """Random bits as a function of seed, pass, row and column: no state, and the same in any order of rows.

    Rows and columns are those of the whole table, of which the given one may be a part.
    """

    def __init__(self, seed: int | None, number: int, table: RowState, ids_U: Tensor):
        self.seed, self.number, self.table, self.ids_U = seed, number, table, ids_U

    def _words(self) -> Tensor | None:
        if self.seed is None:
            return None
        number = torch.tensor((self.seed + _GOLDEN * self.number) & _WORD, device=self.ids_U.device)
        row_shape, shard = self.table.rows.shape[1:], self.table.shard
        column = torch.arange(math.prod(row_shape), device=self.ids_U.device)
        names_U = self.ids_U if self.table.names is None else self.table.names[self.ids_U]
        if shard is not None:
            names_U = shard.names(self.ids_U)
            column = torch.tensor(shard.columns(row_shape, 1), device=self.ids_U.device)
        row_U1 = mix_bits(mix_bits(number) + names_U & _WORD)[:, None]
        return mix_bits(row_U1 + (column + 1) * _GOLDEN & _WORD)

    def weights(self) -> Tensor | None:
        words = self._words()
        return None if words is None else words & 0xFFFF

    def first_moments(self) -> Tensor | None:
        words = self._words()
        return None if words is None else words >> 16

    def second_moments(self) -> Tensor | None:
        words = self._words()
        return None if words is None else mix_bits(words ^ _GOLDEN) & 0xFFFF
