"""Formats of rows that have scales: which there are, how rows are put into one, and their bits."""

import torch
from torch import Tensor

SCALED_DTYPES = (torch.int8, torch.float8_e4m3fn)
"""Eight bits a number; each vector of a row has a scale in float32, by which it is multiplied."""


def quantise(rows: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Rows in one of `SCALED_DTYPES` and scales (...) of float rows (..., D), float32 or float64.

    Each vector's largest entry becomes the largest number of the dtype: 127 of int8, 448 of float8_e4m3fn.
    """
    largest = torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max
    scales = rows.abs().amax(dim=-1) / largest
    safe = torch.where(scales > 0, scales, 1.0)
    scaled = rows / safe[..., None]
    return (scaled if dtype.is_floating_point else scaled.round()).to(dtype), scales


def widened(rows: Tensor, scales: Tensor) -> Tensor:
    """What rows (..., D) with scales (...) stand for, in the dtype of the scales."""
    return rows.to(scales.dtype) * scales[..., None]


def movable(rows: Tensor) -> Tensor:
    """Rows as a view that is moved, indexed and filled with zeros: not every function of PyTorch takes float8."""
    return rows.view(torch.int8) if rows.dtype in SCALED_DTYPES else rows


def rows_at(rows: Tensor, ids: Tensor) -> Tensor:
    """The rows (..., *X) of ids (...) int64, as stored."""
    # index_select takes less than half the time of indexing, and refuses negative ids
    found = movable(rows).index_select(0, ids.flatten()).unflatten(0, ids.shape)
    return found.view(rows.dtype) if rows.dtype in SCALED_DTYPES else found
