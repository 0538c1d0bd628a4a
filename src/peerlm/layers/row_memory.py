"""Memory of rows: in huge pages where the system grants them, given back while rows move elsewhere."""

from collections.abc import Iterator

import torch
from torch import Tensor

from peerlm.ops import api
from peerlm.ops.row_formats import movable


def empty_rows(*shape: int, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
    """Uninitialised rows, (N, ...); on a CPU in huge pages where the system grants them.

    Dtype and device are torch's defaults where they are None.
    """
    rows = torch.empty(shape, dtype=dtype, device=device)
    api.use_huge_pages(rows)
    return rows


def longer_rows(rows: Tensor, length: int, value: float) -> Tensor:
    """`length` rows, the first of which are these; the others are filled with `value`.

    Nothing may read `rows` afterwards: memory that no one else holds is freed while the rows move.
    """
    longer = empty_rows(length, *rows.shape[1:], dtype=rows.dtype, device=rows.device)
    if not rows.is_meta:
        source, target = movable(rows), movable(longer)
        if not api.move_to_start(source, target):
            target[: len(rows)] = source
        target[len(rows) :] = value
    return longer


def chosen_rows(rows: Tensor, ids: Tensor) -> Tensor:
    """These rows in this order; ids (N',) int64."""
    out = empty_rows(len(ids), *rows.shape[1:], dtype=rows.dtype, device=rows.device)
    torch.index_select(movable(rows), 0, ids.to(rows.device), out=movable(out))
    return out


def blocks(count: int, size: int, row_bytes: int, multiple: int = 1) -> Iterator[slice]:
    """Ranges of about `size` bytes of `count` rows; all but the last, which is no smaller, a multiple of rows."""
    at_once = max(1, size // max(1, row_bytes))
    at_once = -(-at_once // multiple) * multiple
    start = 0
    while start < count:
        stop = count if count - start < 2 * at_once else start + at_once
        yield slice(start, stop)
        start = stop
