"""What AdamW does to elements of a row, as functions for kernels, with the arithmetic and rounding of `row_step.py`.

The numbers of a step are in a small float64 tensor on the device, so that nothing is compiled again for another
learning rate, and a captured graph may be replayed with other numbers.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from peerlm.ops.row_formats import EIGHT_BIT_DTYPES
from peerlm.ops.row_updates import RowState, RowStep
from peerlm.ops.triton.scaled_rows import store_codes, widened

_GOLDEN = 0x9E3779B9
_WORD = 0xFFFFFFFF

RATE = tl.constexpr(0)
WEIGHT_DECAY = tl.constexpr(1)
BIAS1 = tl.constexpr(2)
ROOT_BIAS2 = tl.constexpr(3)
EPS = tl.constexpr(4)
BETA1 = tl.constexpr(5)
BETA2 = tl.constexpr(6)
LOG_BETA1 = tl.constexpr(7)
LOG_BETA2 = tl.constexpr(8)
STEP = tl.constexpr(9)
UPDATE_KEY = tl.constexpr(10)
CATCH_UP_KEY = tl.constexpr(11)
_COUNT = 12

PRECISE = {"enable_fp_fusion": False}
"""Options of kernels whose float32 is that of PyTorch, operation by operation."""

_MOST_AT_ONCE = 4096
_ELEMENTS_PER_THREAD = 16
_MOST_ROWS = 2**31 - 1
_LOG_ZERO = -1e6
"""Stands for the logarithm of a beta of zero: times no step it is zero, and its exponential is zero."""


def supports(table: RowState) -> bool:
    """Whether the kernels' dtypes and layouts are those of this table."""
    moments = [table.exp_avg_sq] if table.exp_avg is None else [table.exp_avg, table.exp_avg_sq]
    row_wise = table.exp_avg_sq.ndim == 1
    narrow = (torch.float32, torch.bfloat16)
    whole = table.shard is None or table.rows.dtype == table.exp_avg_sq.dtype == torch.float32  # no random numbers
    scaled = [] if table.scales is None else [table.scales]
    return (
        table.rows.dtype in (EIGHT_BIT_DTYPES if scaled else narrow)
        and (table.by_weight or row_wise)
        and whole
        and all(tensor.dtype in narrow for tensor in moments)
        and not (row_wise and table.exp_avg_sq.dtype != torch.float32)
        and all(tensor.is_contiguous() for tensor in (table.rows, *scaled, *moments))
        and len(table.rows) <= _MOST_ROWS
    )


def row_length(table: RowState) -> int:
    """How many weights a row has."""
    return math.prod(table.rows.shape[1:])


def tile(length: int) -> tuple[int, int]:
    """How many elements of a row of this length a program works on at once, and its number of warps."""
    block = min(triton.next_power_of_2(max(length, 1)), _MOST_AT_ONCE)
    return block, max(1, min(8, block // (32 * _ELEMENTS_PER_THREAD)))


def place_step(step: RowStep, device: torch.device, into: Tensor | None = None) -> Tensor:
    """The numbers of a step on a device, float64, in a new tensor or in an earlier one; nothing waits for the device.

    A learning rate that is a tensor on the device stays there.
    """
    seed = step.seed or 0
    rate = step.learning_rate
    on_device = isinstance(rate, Tensor) and rate.device == device
    numbers = {
        RATE.value: 0.0 if on_device else float(rate),
        WEIGHT_DECAY.value: step.weight_decay,
        BIAS1.value: 1 - step.beta1**step.step if step.step else 1.0,
        ROOT_BIAS2.value: (1 - step.beta2**step.step) ** 0.5 if step.step else 1.0,
        EPS.value: step.eps,
        BETA1.value: step.beta1,
        BETA2.value: step.beta2,
        LOG_BETA1.value: math.log(step.beta1) if step.beta1 else _LOG_ZERO,
        LOG_BETA2.value: math.log(step.beta2) if step.beta2 else _LOG_ZERO,
        STEP.value: step.step,
        UPDATE_KEY.value: _mix_number(seed + _GOLDEN * (2 * step.step)),
        CATCH_UP_KEY.value: _mix_number(seed + _GOLDEN * (2 * step.step + 1)),
    }
    values = torch.tensor([numbers[place] for place in range(_COUNT)], dtype=torch.float64)
    placed = send(values, device, into)
    if on_device:
        assert isinstance(rate, Tensor)
        placed[:1].copy_(rate.detach().reshape(1))
    return placed


def send(values: Tensor, device: torch.device, into: Tensor | None = None) -> Tensor:
    """Values from the host on a device, in a new tensor or at the start of an earlier one, without waiting for it."""
    if into is None:
        into = torch.empty_like(values, device=device)
    if device.type != "cpu":
        values = values.pin_memory()
    into[: len(values)].copy_(values, non_blocking=True)
    return into


def numbers_of(step: RowStep, device: torch.device) -> Tensor:
    """The numbers of a step where kernels find them."""
    return place_step(step, device) if step.placed is None else step.placed


def _mix_number(number: int) -> int:
    word = number & _WORD
    word = (word ^ (word >> 16)) * 0x85EBCA6B & _WORD
    word = (word ^ (word >> 13)) * 0xC2B2AE35 & _WORD
    return word ^ (word >> 16)


@triton.jit
def mix_bits(word):
    """The finaliser of MurmurHash3 (Appleby 2011) of uint32."""
    word = tl.mul(word ^ (word >> 16), 0x85EBCA6B, sanitize_overflow=False)
    word = tl.mul(word ^ (word >> 13), 0xC2B2AE35, sanitize_overflow=False)
    return word ^ (word >> 16)


@triton.jit
def row_key(numbers, KEY: tl.constexpr, row, names):
    """What the random bits of a row are made from, in the pass whose key is number KEY; `names` as of `RowState`."""
    key = tl.load(numbers + KEY).to(tl.int64).to(tl.uint32)
    name = row
    if names is not None:
        name = tl.load(names + row)
    return mix_bits(tl.add(key, name.to(tl.uint32), sanitize_overflow=False))


@triton.jit
def random_words(key, column):
    """A random word for each column of a row."""
    step = tl.mul((column + 1).to(tl.uint32), 0x9E3779B9, sanitize_overflow=False)
    return mix_bits(tl.add(step, key, sanitize_overflow=False))


@triton.jit
def store_rounded(pointers, value, noise, mask, RANDOM: tl.constexpr):
    """Store float32 values; in bfloat16 up or down as 16 bits of noise say where RANDOM, or to nearest."""
    if pointers.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        if not RANDOM:
            noise = ((bits >> 16) & 1) + 0x7FFF
        raised = tl.add(bits, noise, sanitize_overflow=False)
        quiet = bits | tl.where((bits & 0x007FFFFF) != 0, 0x00400000, 0).to(tl.uint32)
        bits = tl.where((bits & 0x7F800000) == 0x7F800000, quiet, raised)
        tl.store(pointers, (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(pointers, value, mask=mask)


@triton.jit
def decay_since(numbers, BETA: tl.constexpr, LOG_BETA: tl.constexpr, age):
    """beta^age in float32; of one step it is beta itself."""
    beta = tl.load(numbers + BETA)
    power = tl.exp(tl.load(numbers + LOG_BETA) * age.to(tl.float64))
    power = tl.where(age == 0, 1.0, power)
    return tl.where(age == 1, beta, power).to(tl.float32)


@triton.jit
def update_numbers(numbers, age):
    """What all elements of a row share in an update, float32: decays, fresh parts, rate, shrinkage, bias root, eps."""
    learning_rate = tl.load(numbers + RATE)
    decay1 = decay_since(numbers, BETA1, LOG_BETA1, age)
    decay2 = decay_since(numbers, BETA2, LOG_BETA2, age)
    fresh1 = (1.0 - tl.load(numbers + BETA1)).to(tl.float32)
    fresh2 = (1.0 - tl.load(numbers + BETA2)).to(tl.float32)
    rate = (learning_rate / tl.load(numbers + BIAS1)).to(tl.float32)
    shrink = (learning_rate * tl.load(numbers + WEIGHT_DECAY)).to(tl.float32)
    root_bias2 = tl.load(numbers + ROOT_BIAS2).to(tl.float32)
    return decay1, decay2, fresh1, fresh2, rate, shrink, root_bias2, tl.load(numbers + EPS).to(tl.float32)


@triton.jit
def age_of_moments(moments_step, row, numbers):
    """How many steps ago the moments of a row were stored; 1 where they do not age."""
    if moments_step is None:
        age = tl.full([], 1, tl.int32)
    else:
        age = tl.load(numbers + STEP).to(tl.int32) - tl.load(moments_step + row)
    return age


@triton.jit
def mark_updated(moments_step, weights_step, row, numbers):
    """Note that a row is right up to this step, once no warp of the program still has to read what is written here."""
    tl.debug_barrier()
    now = tl.load(numbers + STEP).to(tl.int32)
    if moments_step is not None:
        tl.store(moments_step + row, now)
    if weights_step is not None:
        tl.store(weights_step + row, now)


@triton.jit
def second_of_row(exp_avg_sq, row, sum_of_squares, shared, LEN: tl.constexpr):
    """The new second moment of a whole row, stored and returned."""
    _, decay2, _, fresh2, _, _, _, _ = shared
    second = tl.load(exp_avg_sq + row) * decay2 + tl.div_rn(sum_of_squares, LEN * 1.0) * fresh2
    tl.debug_barrier()  # one thread stores it, and every thread has to have read the old one
    tl.store(exp_avg_sq + row, second)
    return second


@triton.jit
def stepped(
    weight,
    exp_avg,
    exp_avg_sq,
    at,
    word,
    mask,
    gradient,
    second,
    shared,
    ROW_WISE: tl.constexpr,
    RANDOM: tl.constexpr,
    KEEP: tl.constexpr,
):
    """What float32 weights at `at` become; their moments are stored where KEEP.

    `word` are their random words; `second` is the row's second moment if ROW_WISE.
    """
    decay1, decay2, fresh1, fresh2, rate, shrink, root_bias2, eps = shared
    if not ROW_WISE:
        before = tl.load(exp_avg_sq + at, mask=mask, other=0.0).to(tl.float32)
        second = before * decay2 + gradient * gradient * fresh2
        if KEEP:
            store_rounded(exp_avg_sq + at, second, mix_bits(word ^ 0x9E3779B9) & 0xFFFF, mask, RANDOM)
    if exp_avg is None:
        first = gradient
    else:
        first = tl.load(exp_avg + at, mask=mask, other=0.0).to(tl.float32) * decay1 + gradient * fresh1
        if KEEP:
            store_rounded(exp_avg + at, first, word >> 16, mask, RANDOM)
    denominator = tl.div_rn(tl.sqrt_rn(second), root_bias2) + eps
    change = weight * shrink + tl.div_rn(rate * first, denominator)
    return weight - change


@triton.jit
def load_weights(rows, at, scale, mask):
    """Elements of a row as they count, float32; `scale` is that of their vector, None of rows that have none."""
    weight = tl.load(rows + at, mask=mask, other=0)
    if scale is None:  # noqa: SIM108 -- known to the compiler, which must not see the other side
        wide = weight.to(tl.float32)
    else:
        wide = widened(weight) * scale
    return wide


@triton.jit
def update_elements(
    rows,
    exp_avg,
    exp_avg_sq,
    start,
    column,
    mask,
    gradient,
    second,
    key,
    shared,
    scale,
    following,
    ROW_WISE: tl.constexpr,
    RANDOM: tl.constexpr,
):
    """One step of some elements of a row that starts at `start`; `second` is the row's second moment if ROW_WISE.

    scale, following: what the elements' vector is multiplied by before and after; None of rows without scales.
    """
    at = start + column
    word = random_words(key, column)
    weight = load_weights(rows, at, scale, mask)
    weight = stepped(weight, exp_avg, exp_avg_sq, at, word, mask, gradient, second, shared, ROW_WISE, RANDOM, True)
    if following is None:
        store_rounded(rows + at, weight, word & 0xFFFF, mask, RANDOM)
    else:
        noise = word & 0xFFFF
        if not RANDOM:
            noise = noise * 0 + 0x8000
        store_codes(rows + at, weight, following, noise, mask)
