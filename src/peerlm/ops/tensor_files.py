"""Safetensors files that have one tensor: what they begin with, and numbers written in their place."""

import json
import os
from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""As safetensors names them."""


def num_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """What a tensor takes."""
    return torch.Size(shape).numel() * dtype.itemsize


def head_of(name: str, shape: Sequence[int], dtype: torch.dtype, *, length: int = 0) -> bytes:
    """What stands before the numbers of the tensor, `length` bytes at least, a multiple of 8."""
    word = next(word for word, each in DTYPES.items() if each == dtype)
    entry = {"dtype": word, "shape": list(shape), "data_offsets": [0, num_bytes(shape, dtype)]}
    text = json.dumps({"__metadata__": {"format": "pt"}, name: entry}).encode()
    text = text.ljust(length - 8)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_at(descriptor: int, values: Tensor, offset: int) -> None:
    """Write the bytes of a tensor from an offset of a file on. Raises OSError where the disk is full."""
    content = memoryview(values.cpu().contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written
