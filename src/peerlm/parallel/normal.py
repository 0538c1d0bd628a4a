"""Normal numbers that are functions of a seed, a table, a row and a column, so that every layout starts alike."""

import math

import torch
from torch import Tensor

from peerlm.optim.row_step import mix_bits

_WORD = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9
_SILVER = 0x85EBCA77


def keyed_normals(seed: int, table: int, rows_U: Tensor, columns_C: Tensor) -> Tensor:
    """Standard normal numbers (U, C), float64, of rows and columns (int64) of a table.

    Two hashes of 32 bits each, whose uniform numbers the transform of Box and Muller (1958) makes normal. They are
    computed in float64, so that rounded to float32 they hardly depend on how processors vectorise the functions.
    """
    uniform = []
    for salt in (_GOLDEN, _SILVER):
        key = torch.tensor(salt, device=rows_U.device)
        for word in (seed & _WORD, seed >> 32 & _WORD, table & _WORD):
            key = mix_bits(key + word & _WORD)
        row_U1 = mix_bits(mix_bits(key + (rows_U & _WORD) & _WORD) + (rows_U >> 32) & _WORD)[:, None]
        word_UC = mix_bits(row_U1 + (columns_C + 1) * salt & _WORD)
        uniform.append((word_UC.double() + 0.5) / 2**32)
    first, second = uniform
    return (-2 * first.log()).sqrt() * (2 * math.pi * second).cos()
