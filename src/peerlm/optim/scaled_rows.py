"""The definition of rows of 8 bits in training: their scales follow them, and they are rounded stochastically.

Native kernels are tested against this file. Shape suffixes: U rows, V vectors of a row, D their width.
"""

import torch
from torch import Tensor

from peerlm.ops.row_formats import largest_number

ROOM_TO_GROW = 1.125
"""What a new scale reaches beyond the largest number of its vector, so that few steps need another one."""
TOO_SMALL = 0.45
"""Share of what a scale reaches, below which its vector gets a smaller one."""
_ROUNDING = 1.000001
_SMALLEST_NORMAL = 121 << 23
"""2^-6 in float32's bits: below, numbers of float8_e4m3fn are multiples of 2^-9."""
_BIAS = 120 << 3
"""Between the exponents of float32 and float8_e4m3fn, behind three bits of fraction."""


def following_scales(wide_UVD: Tensor, scales_UV: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales (U, V) for vectors that have changed: the old ones, unless a vector has outgrown its own or become small.

    What is NaN or infinite in a vector makes its scale so, and by it all its numbers.
    """
    top = largest_number(dtype)
    largest_UV = wide_UVD.abs().amax(dim=-1)
    reach_UV = scales_UV * top
    fits = (largest_UV <= reach_UV * _ROUNDING) & ~(largest_UV < reach_UV * TOO_SMALL)
    return torch.where(fits, scales_UV, largest_UV * torch.tensor(ROOM_TO_GROW / top, dtype=scales_UV.dtype))


def narrow(wide_UVD: Tensor, scales_UV: Tensor, dtype: torch.dtype, random_bits: Tensor | None) -> Tensor:
    """Numbers over their scales in int8 or float8_e4m3fn: (U, V, D), right in the mean.

    random_bits: int64 in 0 .. 65535, like the numbers; None rounds to nearest.
    """
    top = largest_number(dtype)
    inverse_UV1 = torch.where(scales_UV > 0, 1 / scales_UV, 0.0)[..., None]
    value = (wide_UVD * inverse_UV1).nan_to_num(-top).clamp(-top, top)
    bits = torch.full_like(value, 0x8000, dtype=torch.int64) if random_bits is None else random_bits
    share = bits.to(value.dtype) * 2.0**-16
    if dtype == torch.int8:
        return (value + share).floor().to(torch.int8)
    sign = value.signbit().to(torch.int32) << 7
    magnitude = value.abs()
    word = magnitude.contiguous().view(torch.int32)
    normal = ((word + (bits.to(torch.int32) << 4)) >> 20) - _BIAS
    subnormal = (magnitude * 512 + share).to(torch.int32)
    code = torch.where(word >= _SMALLEST_NORMAL, normal, subnormal).clamp_max(0x7E)
    return (code | sign).to(torch.uint8).view(torch.float8_e4m3fn)
