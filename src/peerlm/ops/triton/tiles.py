"""How much of a tensor a program holds at once, and by how many warps: the tile configurations of all kernels.

They follow from shapes alone: nothing is tuned when a kernel first runs.
"""

from typing import NamedTuple

import triton


class Tile(NamedTuple):
    """What a program computes at once."""

    rows: int
    """A power of two."""
    columns: int
    """A power of two."""
    warps: int


def _tile(columns: int, numbers: int, most_rows: int, numbers_per_warp: int) -> Tile:
    """As many rows as make `numbers`, from one to `most_rows`."""
    width = triton.next_power_of_2(columns)
    rows = min(max(numbers // width, 1), most_rows)
    warps = min(max(rows * width // numbers_per_warp, 1), 16)
    return Tile(rows=rows, columns=width, warps=warps)


def exhaustive(n: int) -> Tile:
    """Tokens and sub-keys of `exhaustive.best_of_all`: their float64 scores stay in registers, 16 to a thread."""
    return _tile(n, 4096, 16, 512)


def merge(k: int) -> Tile:
    """Heads of tokens and ranks of `merge.best_pairs`, 4 to a thread."""
    return _tile(k, 512, 64, 128)


def score_gradients(k: int, half_dim: int) -> Tile:
    """Ranks and features of sub-keys of `retrieval_backward.score_gradients`, up to 32 to a thread."""
    ranks = triton.next_power_of_2(k)
    features = min(triton.next_power_of_2(half_dim), max(4096 // ranks, 16))
    warps = 1 if ranks * features <= 1024 else min(ranks * features // 512, 16)
    return Tile(rows=ranks, columns=features, warps=warps)
