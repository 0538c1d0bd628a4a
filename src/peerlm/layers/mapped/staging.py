"""Rows on their way between the host's memory and a device: in pinned buffers, which torch keeps and gives out again.

Shape suffixes: N rows, U of them, W words of a row. Where the device is the CPU, as in tests, the same calls copy.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

_WORDS = (torch.int64, torch.int32, torch.int16)


def as_words(rows: Tensor) -> Tensor:
    """A view (N, W) of contiguous rows (N, ...), which are copied: by the widest integers that fit."""
    flat = rows.reshape(len(rows), -1).view(torch.uint8)
    sizes = (flat.shape[1], flat.storage_offset(), flat.data_ptr())
    return next((flat.view(word) for word in _WORDS if not any(size % word.itemsize for size in sizes)), flat)


def in_words_of(rows_UW: Tensor, other: Tensor) -> Tensor:
    """Rows in the words in which another tensor has them."""
    return rows_UW.view(torch.uint8).view(other.dtype)


def gathered(source_NW: Tensor, ids_U: Tensor, device: torch.device) -> Tensor:
    """Rows ids_U (int64) of host memory, (U, W), in a buffer on the host that the device can copy without waiting."""
    out = _buffer(len(ids_U), source_NW, device)
    torch.index_select(source_NW, 0, ids_U, out=out)
    return out


def stream_for(device: torch.device) -> "torch.cuda.Stream | None":
    """A stream by which a device sends rows while it does other things; None of a CPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


class Leaving:
    """Rows that a device sends to the host, in a stream of its own: until `wait` the host can gather others.

    rows_UW: by name, on the device; nothing else may have them.
    """

    def __init__(self, rows_UW: Mapping[str, Tensor], device: torch.device, stream: "torch.cuda.Stream | None") -> None:
        self._stream, self._rows = stream, dict(rows_UW)
        if stream is None:
            self._host = self._sent(device)
            return
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._host = self._sent(device)

    def _sent(self, device: torch.device) -> dict[str, Tensor]:
        return {
            name: _buffer(len(rows), rows, device).copy_(rows, non_blocking=True) for name, rows in self._rows.items()
        }

    def wait(self) -> dict[str, Tensor]:
        """The rows on the host, once they are there."""
        if self._stream is not None:
            self._stream.synchronize()
        self._rows.clear()  # only now may their memory be given to others
        return self._host


def _buffer(count: int, like: Tensor, device: torch.device) -> Tensor:
    return torch.empty(count, like.shape[1], dtype=like.dtype, device="cpu", pin_memory=device.type == "cuda")
