"""Recorded launches compiled for a GPU that is not there, and what the machine code says.

python tests/ops/triton/compiled.py LAUNCHES TARGET RESULTS

TARGET is a name in `TARGETS`, or backend:architecture:threads of a warp, as cuda:90:32.

Run without TRITON_INTERPRET, with whichever Triton is imported. A result per launch: spilled bytes, shared memory,
widths of loads and stores of global memory, float atomics, barriers that the kernel asks for.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

ROOT = Path(__file__).parents[3]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks/gpu")]

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class _Pointer:
    """Stands for a tensor: its dtype, and an address as aligned as the tensor's was."""

    def __init__(self, dtype: torch.dtype, *, aligned: bool):
        self.dtype = dtype
        self._address = 16 if aligned else 8

    def data_ptr(self) -> int:
        return self._address


def compile_launch(launch: dict[str, Any], target: GPUTarget) -> Any:
    """The compiled kernel of a launch, specialised as the launch would be."""
    kernel = getattr(importlib.import_module(launch["module"]), launch["kernel"])
    backend = make_backend(target)
    arguments = {name: _argument(value) for name, value in launch["arguments"].items()}
    options = dict(launch["options"])
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = binder(**arguments, **options, debug=False)
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, {**options, "debug": False}, bound, specialization, None
    )
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=parsed.__dict__)


def _argument(described: dict[str, Any]) -> Any:
    if "tensor" in described:
        return _Pointer(getattr(torch, described["tensor"]), aligned=described["aligned"])
    if "function" in described:
        module, name = described["function"]
        return getattr(importlib.import_module(module), name)
    if "dtype" in described:
        return triton.language.dtype(described["dtype"])
    return described["value"]


def facts(kernel: Any, target: GPUTarget) -> dict[str, Any]:
    """What the machine code of a compiled kernel says."""
    if target.backend == "cuda":
        text = kernel.asm["ptx"]
        found = {
            "spilled": _stack(kernel.asm["cubin"]),
            "loads": _widths(r"ld\.global\S*", text) + _widths(r"cp\.async\.c[ag]\S*", text),
            "stores": _widths(r"st\.global\S*", text),
            "float_atomics": re.findall(r"\b(?:atom|red)\.\S*\.b?f(?:16|32|64)\S*", text),
        }
    else:
        text = kernel.asm["amdgcn"]
        # scalar registers are spilled to lanes of vector registers, which costs no memory
        spilled = [int(count) for count in re.findall(r"\.vgpr_spill_count:\s*(\d+)", text)]
        scratch = [int(count) for count in re.findall(r"\.private_segment_fixed_size:\s*(\d+)", text)]
        found = {
            "spilled": sum(spilled) + sum(scratch),
            "loads": _dwords("load", text),
            "stores": _dwords("store", text),
            "float_atomics": re.findall(r"(?:global|flat|buffer)_atomic_\w*f(?:16|32|64)\w*", text),
        }
    return {**found, "barriers": len(re.findall(r"\bbarrier\b", kernel.asm["ttir"])), "shared": kernel.metadata.shared}


def _stack(cubin: bytes) -> int:
    """Bytes of a thread's stack, where spilled registers go."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    return sum(int(count) for count in re.findall(r"\b(?:STACK|LOCAL):(\d+)", said))


def _widths(pattern: str, ptx: str) -> Counter[str]:
    """How many instructions move how many bytes for a thread."""
    widths: Counter[str] = Counter()
    for name in re.findall(pattern, ptx):
        if name.startswith("cp."):
            widths["16"] += 1
            continue
        vector = re.search(r"\.v(\d)", name)
        bits = re.search(r"\.[bfus](\d+)$", name)
        assert bits is not None, name
        widths[str(int(bits[1]) // 8 * int(vector[1] if vector else 1))] += 1
    return widths


def _dwords(kind: str, text: str) -> Counter[str]:
    widths: Counter[str] = Counter()
    for name in re.findall(rf"(?:global|flat|buffer)_{kind}_(\w+)", text):
        dwords = re.match(r"dwordx?(\d?)", name)
        widths[str(4 * int(dwords[1] or 1)) if dwords else "2"] += 1
    return widths


def _target(text: str) -> GPUTarget:
    backend, architecture, threads = text.split(":")
    return GPUTarget(backend, int(architecture) if architecture.isdecimal() else architecture, int(threads))


def _exists_on(target: GPUTarget, launch: dict[str, Any]) -> bool:
    """Cards before sm_89 do not convert float8_e4m3fn; peerlm says so before it launches anything."""
    float8 = any(each.get("tensor") == "float8_e4m3fn" for each in launch["arguments"].values())
    return not (float8 and target.backend == "cuda" and target.arch < 89)


def main() -> None:
    """Compile all launches of a file for one target."""
    launches, name, results = sys.argv[1:]
    target = TARGETS[name] if name in TARGETS else _target(name)
    found = []
    for launch in filter(
        partial(_exists_on, target), json.loads(Path(launches).read_text(encoding="utf-8"))["launches"]
    ):
        try:
            outcome = facts(compile_launch(launch, target), target)
        except Exception as error:
            outcome = {"failed": f"{type(error).__name__}: {error}"}
        found.append({**launch, **outcome, "target": name, "triton": triton.__version__})
    Path(results).write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
