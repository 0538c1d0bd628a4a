"""The limits of this machine's memory, measured by the loops of ceilings.c, which is compiled on first use."""

import ctypes
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

_POINTER, _COUNT, _THREADS = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


def _build() -> ctypes.CDLL:
    library = Path(tempfile.mkdtemp()) / "ceilings.so"
    flags = ["-O3", "-march=native", "-ffast-math", "-fopenmp", "-shared", "-fPIC"]
    subprocess.run(
        [os.environ.get("CC", "cc"), *flags, str(Path(__file__).with_name("ceilings.c")), "-o", str(library)],
        check=True,
    )
    loaded = ctypes.CDLL(str(library))
    loaded.read_all.restype = loaded.gather.restype = ctypes.c_double
    loaded.read_all.argtypes = [_POINTER, _COUNT, _THREADS]
    loaded.copy_all.argtypes = [_POINTER, _POINTER, _COUNT, _THREADS]
    loaded.gather.argtypes = [_POINTER, _POINTER, _COUNT, _COUNT, _THREADS]
    return loaded


class Ceilings:
    """Loops that do nothing but move memory; each call reads or copies once."""

    def __init__(self) -> None:
        self._library = _build()

    def read(self, tensor: Tensor) -> None:
        """Read all of a contiguous float32 tensor."""
        self._library.read_all(tensor.data_ptr(), tensor.numel(), torch.get_num_threads())

    def copy(self, to: Tensor, source: Tensor) -> None:
        """Copy a contiguous float32 tensor."""
        self._library.copy_all(to.data_ptr(), source.data_ptr(), source.numel(), torch.get_num_threads())

    def gather(self, rows: Tensor, ids: Tensor) -> None:
        """Read the rows (N, width) float32 that ids, contiguous int64, name."""
        self._library.gather(rows.data_ptr(), ids.data_ptr(), ids.numel(), rows.shape[1], torch.get_num_threads())
