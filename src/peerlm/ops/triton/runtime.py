"""Whether Triton is here, where its kernels run, and which operators they implement."""

import importlib
import importlib.util
import os
import re

import torch
from torch import Tensor

from peerlm.ops.compiled import constant_in_graphs
from peerlm.ops.operators import PEERLM, Operators

OLDEST = (3, 6)

OLDEST_GPU = (8, 0)
"""NVIDIA's compute capability from which on Triton compiles for a GPU, and multiplies bfloat16."""

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
    if not INTERPRETED and not torch.cuda.is_available():
        return "PyTorch finds no GPU, and TRITON_INTERPRET=1 is not set"
    if INTERPRETED and importlib.util.find_spec("numpy") is None:
        return "NumPy is not installed, which Triton's interpreter computes with: pip install numpy"
    try:
        found = _version()  # of the module: packages of ROCm and of nightly builds have other names
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < OLDEST:
        needed = ".".join(map(str, OLDEST))
        return f"Triton is {found}, and the kernels need {needed} or newer: pip install 'triton>={needed}'"
    return ""


def _version() -> str:
    return importlib.import_module("triton").__version__


_REASON = _why_not()


@constant_in_graphs  # torch.compile does not trace the search for a package
def unavailable() -> str:
    """Why the kernels cannot run here; empty where they can."""
    return _REASON


def description() -> str:
    """What is in use, in one phrase, or why nothing is."""
    if _REASON:
        return f"not available: {_REASON}"
    if INTERPRETED:
        return f"Triton {_version()}'s interpreter, on the CPU, for tests alone"
    if reason := too_old():
        return f"not available: {reason}"
    return f"Triton kernels on {torch.cuda.get_device_name()}"


def on_another_device(*tensors: Tensor | None) -> str:
    """Why these tensors cannot be computed with, for where they are; empty where they can."""
    for tensor in tensors:
        if tensor is not None and tensor.device.type != DEVICE_TYPE:
            where = "the CPU, interpreted" if INTERPRETED else "a GPU"
            return f"a tensor is on {tensor.device}, and the Triton kernels run on {where}"
    return ""


@constant_in_graphs
def too_old() -> str:
    """Why the kernels cannot be compiled for this GPU; empty where they can. It is asked once there are tensors on it.

    So whoever uses the CPU of a machine with a GPU leaves that alone.
    """
    if _has_capability(OLDEST_GPU):
        return ""
    has, needed = (".".join(map(str, each)) for each in (torch.cuda.get_device_capability(), OLDEST_GPU))
    return f"{torch.cuda.get_device_name()} has compute capability {has}, and the Triton kernels need {needed} or newer"


@constant_in_graphs
def no_float8() -> str:
    """Why rows in float8_e4m3fn cannot be read here; empty where they can."""
    if _has_capability((8, 9)):
        return ""
    return f"{torch.cuda.get_device_name()} does not convert torch.float8_e4m3fn, in which the rows are"


def _has_capability(capability: tuple[int, int]) -> bool:
    """Whether the GPU has this compute capability or a higher one; AMD's have none, and the interpreter needs none."""
    return INTERPRETED or bool(torch.version.hip) or torch.cuda.get_device_capability() >= capability
