"""Entries of tokens sorted by the row that they name, without a word to the host.

Shape suffixes: T tokens, P entries per token, E = T * P entries.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
_MOST_ENTRIES = 2**30
"""Kernels count entries in int32, and somewhat beyond the last."""
_MOST_ROWS = 2**31 - 1


@dataclass(frozen=True)
class Segments:
    """The entries of ids (T, P) by row: a segment is the entries of one row, in the order in which they stand in ids.

    How many segments there are is known on the device alone. Tensors have as many places as there may be segments;
    those from `count` on are padding.
    """

    order: Tensor
    """(E,) int32: entry numbers t * P + p, sorted stably by row."""
    ids: Tensor
    """(E,) int64: the distinct rows, ascending, then -1."""
    starts: Tensor
    """(E + 1,) int32: where in `order` each segment starts, then the number of entries that are in a segment."""
    count: Tensor
    """(1,) int32: the number of segments."""


def segments(ids_TP: Tensor, num_rows: int) -> Segments:
    """Sort the entries of ids (T, P) int64 by row.

    An id that is not in 0 .. num_rows - 1 is in no segment: its entry is behind all segments in `order`, so that starts
    end with fewer than T * P.

    Raises:
        ValueError: there are more than 2^30 entries, or 2^31 rows or more.
    """
    entries = ids_TP.numel()
    for many, most, what in ((entries, _MOST_ENTRIES, "entries of tokens"), (num_rows, _MOST_ROWS, "rows of a table")):
        if many > most:
            raise ValueError(f"{many} {what} are too many; the Triton kernels take up to {most}")
    device = ids_TP.device
    ids = torch.empty(entries, dtype=torch.int64, device=device)
    starts = torch.empty(entries + 1, dtype=torch.int32, device=device)
    if entries == 0:
        count = torch.zeros(1, dtype=torch.int32, device=device)
        return Segments(order=torch.empty(0, dtype=torch.int32, device=device), ids=ids, starts=count, count=count)
    flat_E = ids_TP.reshape(-1)
    is_row_E = (flat_E >= 0) & (flat_E < num_rows)
    sorted_E, order_E = flat_E.masked_fill(~is_row_E, num_rows).int().sort(stable=True)
    starts_one_E = sorted_E < num_rows
    starts_one_E[1:] &= sorted_E[1:] != sorted_E[:-1]
    segments_so_far_E = starts_one_E.cumsum(0, dtype=torch.int32)
    count = segments_so_far_E[-1:].clone()
    _write_segments[(triton.cdiv(entries, _BLOCK),)](
        sorted_E, segments_so_far_E, is_row_E.sum(dtype=torch.int32), ids, starts, entries, _BLOCK
    )
    return Segments(order=order_E.int(), ids=ids, starts=starts, count=count)


@triton.jit(do_not_specialize=["entries"])
def _write_segments(sorted_E, segments_so_far_E, num_in_segments, ids, starts, entries, BLOCK: tl.constexpr):
    """Each place of ids and starts is written once: that of a segment by its first entry, padding by its own number."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < entries
    so_far = tl.load(segments_so_far_E + entry, mask=inside, other=0)
    before = tl.load(segments_so_far_E + entry - 1, mask=inside & (entry > 0), other=0)
    row = tl.load(sorted_E + entry, mask=inside, other=0)
    first = inside & (so_far > before)
    tl.store(ids + before, row.to(tl.int64), mask=first)
    tl.store(starts + before, entry, mask=first)
    count = tl.load(segments_so_far_E + entries - 1)
    behind = tl.load(num_in_segments)
    tl.store(ids + entry, tl.full([BLOCK], -1, tl.int64), mask=inside & (entry >= count))
    # the last place, of number `entries`, has no entry: it is padding in any case
    tl.store(starts + entry + 1, tl.zeros([BLOCK], tl.int32) + behind, mask=inside & (entry + 1 >= count))
    tl.store(starts + entry, tl.zeros([BLOCK], tl.int32) + behind, mask=inside & (entry == 0) & (count == 0))
