"""Keep freed memory with this process, by settings of the C library."""

import ctypes
import os
import sys

KEPT_BYTES = 1 << 30
"""Blocks up to this many bytes are kept when they are freed; larger ones, tables above all, go back to the system."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt's parameters in malloc.h
_USERS_OWN = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")


def keep_freed_memory() -> bool:
    """Keep freed blocks of up to 1 GiB with this process, for its next step.

    By default glibc maps a new block for each request above 32 MiB and unmaps it when it is freed. The system then
    clears the pages of the logits and other large tensors in every step: a seventh to two fifths of training time on a
    CPU (docs/log.md). The process then keeps its largest extent to its end, a few blocks larger than before at most.

    Returns:
        Whether it is so: false on systems without glibc's `mallopt`, where it refuses, and where one of malloc's own
        environment variables is set, which count more.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _USERS_OWN):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_MMAP_THRESHOLD, KEPT_BYTES) and mallopt(_TRIM_THRESHOLD, -1))
