"""Which id the expert of two sub-keys has: pairings of (i, j) with 0 .. n * n - 1.

A pairing must be monotone: i' <= i and j' <= j give an id that is no higher. Product keys are exact where scores tie
because of that (docs/mathematics.md).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pairing:
    """A pairing, there and back; integers int64 of any shape."""

    ids: Callable[[Tensor, Tensor, int], Tensor]
    """(i, j, n) -> id in 0 .. n * n - 1, for i and j in 0 .. n - 1."""
    sub_keys: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    """(id, n) -> i, j."""


def _row_major_ids(i: Tensor, j: Tensor, n: int) -> Tensor:
    return i * n + j


def _row_major_sub_keys(ids: Tensor, n: int) -> tuple[Tensor, Tensor]:
    return ids // n, ids % n


def _shells_ids(i: Tensor, j: Tensor, n: int) -> Tensor:
    return torch.where(i < j, j * j + i, i * i + i + j)


def _shells_sub_keys(ids: Tensor, n: int) -> tuple[Tensor, Tensor]:
    shell = ids.double().sqrt().long()  # exact: ids are far below 2^52
    rest = ids - shell * shell
    return torch.where(rest < shell, rest, shell), torch.where(rest < shell, shell, rest - shell)


PAIRINGS: dict[str, Pairing] = {
    "row-major": Pairing(_row_major_ids, _row_major_sub_keys),
    "shells": Pairing(_shells_ids, _shells_sub_keys),
}
"""By name. "row-major": i * n + j. "shells" (Szudzik 2006, "An Elegant Pairing Function"): pairs in the order of
max(i, j), so that the ids of the first n sub-keys do not depend on n, and more sub-keys only append."""
