"""How much of a tensor a program holds at once, and by how many warps: the tile configurations of all kernels.

They follow from shapes alone: nothing is tuned when a kernel first runs.
"""

from typing import NamedTuple

import triton

PROGRAMS_FOR_MISSED = 1024
"""Of `exhaustive.best_of_all_for_missed`, which take rows by turns: most end at once, as few rows are missed."""


_MOST_OF_SUB_KEYS = 16384
"""Numbers in bfloat16 that a program scores at once: two such tiles fit the shared memory of AMD's GPUs, of 64 KB."""


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
    return _tile(n, 4096, 8, 512)


def exhaustive_for_one(n: int) -> Tile:
    """The same for one row of `exhaustive.best_of_all_for_missed`."""
    return _tile(n, 1, 1, 512)


def merge(k: int) -> Tile:
    """Heads of tokens and ranks of `merge.best_pairs`, 4 to a thread."""
    return _tile(k, 512, 64, 128)


def score_gradients(k: int, half_dim: int) -> Tile:
    """Ranks and features of sub-keys of `retrieval_backward.score_gradients`, up to 32 to a thread."""
    ranks = triton.next_power_of_2(k)
    features = min(triton.next_power_of_2(half_dim), max(4096 // ranks, 16))
    warps = 1 if ranks * features <= 1024 else min(ranks * features // 512, 16)
    return Tile(rows=ranks, columns=features, warps=warps)


class Shortlist(NamedTuple):
    """How `shortlist`'s kernels work."""

    tokens: int
    """Of a program that lists candidates."""
    groups: int
    """Sub-keys that it scores at once, and groups whose best decide what is listed."""
    features: int
    warps: int
    stages: int
    """Of loads that it asks for ahead."""
    places: int
    """In a list; twice k, as about a quarter more than k are listed of normal scores."""
    lists: int
    """That a program ranks."""
    ranking_warps: int


def shortlist(tokens: int, n: int, half_dim: int, k: int) -> Shortlist | None:
    """The tiles of the kernels in `shortlist`; None where it is quicker to score all sub-keys in float64 at once."""
    groups = max(128, 4 * triton.next_power_of_2(k))
    features = max(16, triton.next_power_of_2(half_dim))
    if tokens < 128 or n < 2 * groups or k > 64 or groups * features > _MOST_OF_SUB_KEYS:
        return None
    places = max(32, 2 * triton.next_power_of_2(k))
    return Shortlist(
        tokens=min(4096 // groups, max(16, 2048 // features)),  # two programs fit a multiprocessor
        groups=groups,
        features=features,
        warps=8,
        stages=2,
        places=places,
        lists=max(1, 64 // places),
        ranking_warps=places // 16,
    )
