"""Whether Triton is here, where its kernels run, and which operators they implement."""

import importlib.util
import os
from importlib.metadata import version

import torch
from torch import Tensor

from peerlm.ops.operators import PEERLM, Operators

OLDEST = (3, 6)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's interpreter runs the kernels on a CPU, slowly, to test them. Triton asks when it is imported."""

DEVICE_TYPE = "cpu" if INTERPRETED else "cuda"
"""What the tensors must be on; PyTorch calls AMD's GPUs "cuda" too."""

DISPATCH_KEY = DEVICE_TYPE.upper()

OPERATORS = Operators("peerlm_interpreted") if INTERPRETED else PEERLM
"""What the kernels are registered for. Interpreted ones must not take the place of the CPU's."""


def _why_not() -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'peerlm[gpu]'"
    found = version("triton") if not torch.version.hip else version("pytorch-triton-rocm")
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        return f"Triton is {found}, and the kernels need {'.'.join(map(str, OLDEST))} or newer"
    if INTERPRETED or torch.cuda.is_available():
        return ""
    return "PyTorch finds no GPU, and TRITON_INTERPRET=1 is not set"


_REASON = _why_not()


@torch.compiler.assume_constant_result  # torch.compile does not trace the search for a package
def unavailable() -> str:
    """Why the kernels cannot run here; empty where they can."""
    return _REASON


def description() -> str:
    """What is in use, in one phrase, or why nothing is."""
    if _REASON:
        return f"not available: {_REASON}"
    if INTERPRETED:
        return f"Triton {version('triton')}'s interpreter, on the CPU, for tests alone"
    return f"Triton kernels on {torch.cuda.get_device_name()}"


def on_another_device(*tensors: Tensor | None) -> str:
    """Why these tensors cannot be computed with, for where they are; empty where they can."""
    for tensor in tensors:
        if tensor is not None and tensor.device.type != DEVICE_TYPE:
            where = "the CPU, interpreted" if INTERPRETED else "a GPU"
            return f"a tensor is on {tensor.device}, and the Triton kernels run on {where}"
    return ""


@torch.compiler.assume_constant_result
def no_float8() -> str:
    """Why rows in float8_e4m3fn cannot be read here; empty where they can."""
    if INTERPRETED or torch.version.hip or torch.cuda.get_device_capability() >= (8, 9):
        return ""
    return f"{torch.cuda.get_device_name()} does not convert torch.float8_e4m3fn, in which the rows are"
