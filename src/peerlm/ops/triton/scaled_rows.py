"""Vectors of 8 bits inside kernels of steps: what they stand for, their scales that follow them, and their rounding.

As `optim/scaled_rows.py` defines it. Kernels take float8_e4m3fn as bytes (`codes_of`), so that its bits are made alike
on every GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peerlm.ops.row_formats import largest_number

_INT8_TOP = tl.constexpr(largest_number(torch.int8))
_FLOAT8_TOP = tl.constexpr(largest_number(torch.float8_e4m3fn))
_ROUNDING = tl.constexpr(1.000001)
_ROOM_TO_GROW = tl.constexpr(1.125)
_TOO_SMALL = tl.constexpr(0.45)
_SIZE = tl.constexpr(0x7FFFFFFF)
"""Of a float32's bits those that are not its sign: NaN is the largest."""
_SMALLEST_NORMAL = tl.constexpr(121 << 23)
_BIAS = tl.constexpr(120 << 3)


def codes_of(rows: Tensor) -> Tensor:
    """Rows as the kernels of steps take them: float8 as bytes, all others as they are."""
    return rows.view(torch.uint8) if rows.dtype == torch.float8_e4m3fn else rows


@triton.jit
def size_of(value):
    """An int32 that grows with the magnitude of a float32; NaN has the largest."""
    return value.to(tl.int32, bitcast=True) & _SIZE


@triton.jit
def widened(code):
    """What codes stand for, their scale aside, in float32."""
    if code.dtype == tl.int8:
        value = code.to(tl.float32)
    else:
        bits = code.to(tl.int32)
        magnitude = bits & 0x7F
        normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
        size = tl.where(magnitude >= 8, normal, magnitude.to(tl.float32) * 0.001953125)
        value = tl.where(bits >= 128, -size, size)
    return value


@triton.jit
def following_scale(rows, scale, largest):
    """The scale of a vector of rows that has changed, whose largest number has the size `largest` (`size_of`)."""
    TOP: tl.constexpr = _INT8_TOP if rows.dtype.element_ty == tl.int8 else _FLOAT8_TOP
    number = largest.to(tl.float32, bitcast=True)
    reach = scale * TOP
    fits = (number <= reach * _ROUNDING) & ((number < reach * _TOO_SMALL) == 0)
    return tl.where(fits, scale, number * (_ROOM_TO_GROW / TOP))


@triton.jit
def store_codes(pointers, value, scale, noise, mask):
    """Store float32 values over their scale, up or down as 16 bits of noise say."""
    TOP: tl.constexpr = _INT8_TOP if pointers.dtype.element_ty == tl.int8 else _FLOAT8_TOP
    inverse = tl.where(scale > 0.0, tl.div_rn(1.0, scale), 0.0)
    number = value * inverse
    number = tl.where(number > -TOP, number, -TOP)  # NaN, too
    number = tl.where(number < TOP, number, TOP)
    share = noise.to(tl.float32) * 0.0000152587890625
    if pointers.dtype.element_ty == tl.int8:
        tl.store(pointers, tl.floor(number + share).to(tl.int32).to(tl.int8), mask=mask)
    else:
        size = size_of(number)
        normal = ((size + (noise.to(tl.int32) << 4)) >> 20) - _BIAS
        subnormal = (size.to(tl.float32, bitcast=True) * 512.0 + share).to(tl.int32)
        code = tl.minimum(tl.where(size >= _SMALLEST_NORMAL, normal, subnormal), 0x7E)
        sign = tl.where(number.to(tl.int32, bitcast=True) < 0, 128, 0)
        tl.store(pointers, (code | sign).to(tl.uint8), mask=mask)
