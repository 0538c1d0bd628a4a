"""Formats of rows that have scales: which there are, how rows are put into one, and their bits."""

import torch
from torch import Tensor

EIGHT_BIT_DTYPES = (torch.int8, torch.float8_e4m3fn)
"""Eight bits a number; each vector of a row has a scale in float32, by which it is multiplied."""
INT4 = torch.uint8
"""The dtype of rows whose bytes hold two numbers of -8 .. 7 each, with 8 added; groups of 32 have a scale in float32.

Byte i of a group's 16 has number i in its low half and number 16 + i in its high half.
"""
SCALED_DTYPES = (*EIGHT_BIT_DTYPES, INT4)
GROUP = 32
_REACHES = torch.tensor([-8.0, -7.5, -7.0])
"""What a group's number of the largest size may become: the scale of least error is taken."""


def stored_shape(row_shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, ...]:
    """The shape in which rows of `row_shape` are stored. Raises ValueError where int4 groups do not fit."""
    if dtype != INT4:
        return row_shape
    if row_shape[-1] % GROUP:
        raise ValueError(f"rows of width {row_shape[-1]} have no int4 format, whose groups are {GROUP} wide: take int8")
    return (*row_shape[:-1], row_shape[-1] // 2)


def scales_shape(row_shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, ...]:
    """The shape of the scales of a row."""
    return (*row_shape[:-1], row_shape[-1] // GROUP) if dtype == INT4 else row_shape[:-1]


def width(rows: Tensor) -> int:
    """Numbers in each vector of stored rows (..., D or D / 2)."""
    return rows.shape[-1] * 2 if rows.dtype == INT4 else rows.shape[-1]


def largest_number(dtype: torch.dtype) -> float:
    """The largest number of int8 or float8_e4m3fn, the most negative left aside."""
    return float(torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max)


def quantise(rows: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Rows in one of `SCALED_DTYPES` and their scales, of float rows (..., D); scales in float32 or float64.

    Each vector's largest entry becomes the largest number of the dtype: 127 of int8, 448 of float8_e4m3fn. Of int4 each
    group's largest becomes -8, -7.5 or -7, whichever leaves the least error.
    """
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))  # a scale of 16 bits would be off by 1 in 256
    if dtype == INT4:
        return _quantise_groups(rows)
    scales = rows.abs().amax(dim=-1) / largest_number(dtype)
    safe = torch.where(scales > 0, scales, 1.0)
    scaled = rows / safe[..., None]
    return (scaled if dtype.is_floating_point else scaled.round()).to(dtype), scales


def _quantise_groups(rows: Tensor) -> tuple[Tensor, Tensor]:
    stored_shape(tuple(rows.shape), INT4)
    groups = rows.unflatten(-1, (-1, GROUP))
    largest = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True))[..., 0]
    best, numbers, scales = None, torch.empty_like(groups), torch.empty_like(largest)
    for reach in _REACHES.tolist():
        scale = largest / reach
        tried = (groups / torch.where(scale != 0, scale, 1.0)[..., None]).round().clamp(-8, 7)
        error = (tried * scale[..., None] - groups).square().sum(dim=-1)
        better = torch.ones_like(error, dtype=torch.bool) if best is None else error < best
        best = error if best is None else torch.where(better, error, best)
        numbers = torch.where(better[..., None], tried, numbers)
        scales = torch.where(better, scale, scales)
    codes = (numbers.nan_to_num() + 8).to(torch.uint8)
    low, high = codes.split(GROUP // 2, dim=-1)
    return (low | high << 4).flatten(-2), scales


def widened(rows: Tensor, scales: Tensor) -> Tensor:
    """What rows (..., D) with scales (...) stand for, in the dtype of the scales; int4 ones become (..., D)."""
    if rows.dtype != INT4:
        return rows.to(scales.dtype) * scales[..., None]
    bytes_ = rows.unflatten(-1, (-1, GROUP // 2))
    numbers = torch.cat([bytes_ & 15, bytes_ >> 4], dim=-1).to(scales.dtype) - 8
    return (numbers * scales[..., None]).flatten(-2)


def movable(rows: Tensor) -> Tensor:
    """Rows as a view that is moved, indexed and filled with zeros: not every function of PyTorch takes float8."""
    return rows.view(torch.int8) if rows.dtype in SCALED_DTYPES else rows


def rows_at(rows: Tensor, ids: Tensor) -> Tensor:
    """The rows (..., *X) of ids (...) int64, as stored."""
    # index_select takes less than half the time of indexing, and refuses negative ids
    found = movable(rows).index_select(0, ids.flatten()).unflatten(0, ids.shape)
    return found.view(rows.dtype) if rows.dtype in SCALED_DTYPES else found
