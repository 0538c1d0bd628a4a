"""The compiled module: whether it is there, what it runs on, and what the files of this backend need of it."""

from pathlib import Path

import torch
from torch import Tensor

from peerlm.errors import UserError
from peerlm.ops.compiled import constant_in_graphs
from peerlm.ops.tensors import has_values

_WORTH_KEEPING = 2**22  # bytes; torch keeps smaller ones itself
_CALLS = 2  # as in bindings.cpp

try:
    import peerlm.ops.cpu._native as module

    _reason = ""
except ImportError as error:  # pure-Python installation, or a machine other than the one it was built for
    module = None
    _reason = (
        f"the native kernels were not built when peerlm was installed ({error}): install it again, "
        "which takes a C++17 compiler"
    )


@constant_in_graphs  # torch.compile cannot look into the extension
def unavailable() -> str:
    """Why there are no native kernels here; empty where there are.

    Raises:
        UserError: PEERLM_SIMD names no target that this machine runs.
    """
    if module is not None:
        try:
            module.target()
        except RuntimeError as error:
            raise UserError(str(error)) from error
    return _reason


def description() -> str:
    """What is in use, in one phrase, or why nothing is."""
    if reason := unavailable():
        return f"not available: {reason}"
    found = f"native kernels for {module.target()}, of {module.runnable_targets()}; {torch.get_num_threads()} threads"
    return (
        found if joins_calls() else f"{found}; built from older sources, so that few tokens are slow: install it again"
    )


def joins_calls() -> bool:
    """Whether layers and attention have calls for few tokens: not in a module that was built from older sources."""
    return not unavailable() and getattr(module, "calls", None) == _CALLS


def use_huge_pages(tensor: Tensor) -> bool:
    """Ask the system to back a large, contiguous CPU tensor by huge pages; returns whether it agreed.

    Rows that lie anywhere in gigabytes are read up to twice as fast from them. Pages touched before keep their size
    until the system merges them.
    """
    if module is None or tensor.device.type != "cpu" or not has_values(tensor):
        return False
    return bool(module.use_huge_pages(tensor.detach()))


def recycled(rows: int, parts: int, dim: int) -> Tensor:
    """Uninitialised float32 (rows, parts, dim), in memory that large tensors of this function's had before.

    The system clears every page that it hands out, which for the gradient of a table's rows costs a fifth of a step.
    """
    if 4 * rows * parts * dim < _WORTH_KEEPING:
        return torch.empty(rows, parts, dim, dtype=torch.float32, device="cpu")
    tensor: Tensor = module.recycled(rows, parts, dim)
    return tensor


def move_to_start(source: Tensor, target: Tensor) -> bool:
    """Move a CPU tensor to the start of a larger one of its dtype; both contiguous. Returns whether that was done here.

    The memory of `source` goes back to the system page by page, so that both are never there at once: it must not be
    read again, through any tensor that shares it. Nothing is done where other tensors or another library (numpy) may
    share it, or there are no native kernels.
    """
    if module is None or source.device.type != "cpu" or not has_values(source):
        return False
    if not source.is_contiguous() or source.is_pinned():
        return False
    storage = source.untyped_storage()
    count = getattr(torch._C, "_storage_Use_Count", None)  # not public; without it nothing is moved
    owners = 0 if count is None else count(storage._cdata) - 1  # `storage` here is one
    if owners != 1 or not (storage.resizable() or _is_of_a_file(storage.data_ptr())):
        return False
    flat = (source.detach().view(-1).view(torch.uint8), target.view(-1).view(torch.uint8))
    module.move_bytes(*flat, torch.get_num_threads())
    return True


def _is_of_a_file(address: int) -> bool:
    """Whether memory is that of a mapped file, as of weights that were loaded; no other tensor's."""
    maps = Path("/proc/self/maps")
    for line in maps.read_text().splitlines() if maps.is_file() else []:
        fields = line.split(maxsplit=5)  # range, permissions, offset, device, inode, path
        first, last = (int(end, 16) for end in fields[0].split("-"))
        if first <= address < last:
            return fields[4] != "0"
    return False


def as_bytes(rows: Tensor) -> Tensor:
    """Rows as the module takes them: float8 as uint8, all others as they are."""
    return rows.view(torch.uint8) if rows.dtype == torch.float8_e4m3fn else rows


def group_by_row(ids: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the entries of ids (T, P) by row, stably.

    Returns order (T * P,) int32: entry numbers; starts (U + 1,) int64: where in `order` each row's entries start;
    and the U rows that occur, ascending, int64.
    """
    count = ids.numel()
    order = torch.empty(count, dtype=torch.int32)
    starts = torch.empty(count + 1, dtype=torch.int64)
    found = torch.empty(count, dtype=torch.int64)
    rows = module.group_by_row(ids, num_rows, order, starts, found, torch.get_num_threads())
    return order, starts[: rows + 1], found[:rows].clone()
