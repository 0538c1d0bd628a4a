"""How the system is to read a saved table that does not fit into memory: the pages of rows that are used, no others."""

import ctypes
import mmap
from pathlib import Path

from torch import nn

from peerlm.layers.mapped.file import PAGE, libc
from peerlm.layers.table import Table

_SHARE_OF_MEMORY = 0.5
"""A table that takes more of the memory that programs can have is not read ahead."""


def read_rows_alone(model: nn.Module) -> list[str]:
    """Have the system read no more than the rows in use of tables too large for the memory that is free.

    By default it reads what lies behind a row as well, which is quicker where all of the table will be in memory. It
    matters for rows that are mapped files, as `from_pretrained` loads them. Returns the paths of these tables.
    """
    most = _SHARE_OF_MEMORY * available_memory()
    found = []
    for path, table in model.named_modules():
        if not isinstance(table, Table) or table.device.type != "cpu":
            continue
        parameters = table.row_parameters()
        if sum(parameter.nbytes for parameter in parameters) > most:
            for parameter in parameters:
                begin = -(-parameter.data_ptr() // PAGE) * PAGE
                length = parameter.data_ptr() + parameter.nbytes - begin
                if length > 0:
                    libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), mmap.MADV_RANDOM)
            found.append(path)
    return found


def available_memory() -> float:
    """Bytes that programs can have without that others lose theirs; infinite where the system does not say."""
    path = Path("/proc/meminfo")
    for line in path.read_text().splitlines() if path.is_file() else []:
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return 1024 * int(value.split()[0])
    return float("inf")
