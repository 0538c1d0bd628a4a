"""Kernels compiled for GPUs that are not there: nothing spilled, wide loads, no float atomics, enough shared memory.

In the suite for one target and the usual settings; `make gpu-compile` takes all of both, with any version of Triton.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ALL_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""What one program may have."""
WIDE_ROW = 512
"""Bytes from which a row of a table is read in wide pieces."""
WIDE = {"sm_80": 16, "sm_90": 16, "sm_100": 16, "gfx942": 8}
"""Bytes that a thread moves at a time; with twice the threads in a warp, half as many do."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed: peerlm[gpu]"),
]


def run(script: str, *arguments: str, interpret: bool) -> None:
    """Run a script of this folder in a process with or without Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="session")
def launches(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the launches that are compiled."""
    file = tmp_path_factory.mktemp("launches") / "launches.json"
    run(
        "launches.py",
        str(file),
        "all" if request.config.getoption("--gpu-targets") == "all" else "suite",
        interpret=True,
    )
    return file


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kernels" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--gpu-targets")
        metafunc.parametrize("kernels", ALL_TARGETS if chosen == "all" else [chosen], indirect=True, scope="session")


@pytest.fixture(scope="session")
def kernels(request: pytest.FixtureRequest, launches: Path) -> list[dict[str, Any]]:
    """What became of each launch when compiled for one target."""
    results = launches.with_name(f"{request.param}.json")
    run("compiled.py", str(launches), request.param, str(results), interpret=False)
    return json.loads(results.read_text(encoding="utf-8"))


def offenders(kernels: list[dict[str, Any]], wrong: Callable[[dict[str, Any]], object]) -> list[str]:
    """One line for each kernel that `wrong` says something of."""
    return [
        f"{kernel['module']}.{kernel['kernel']} ({kernel['workload']}, {kernel['target']}): {said}"
        for kernel in kernels
        if "failed" not in kernel and (said := wrong(kernel))
    ]


def test_every_operator_launches_kernels(launches: Path) -> None:
    assert json.loads(launches.read_text(encoding="utf-8"))["failed"] == {}


def test_every_kernel_compiles(kernels: list[dict[str, Any]]) -> None:
    assert kernels
    assert [(kernel["kernel"], kernel["failed"]) for kernel in kernels if "failed" in kernel] == []


def test_no_kernel_spills_registers(kernels: list[dict[str, Any]]) -> None:
    assert offenders(kernels, spilled) == []


def test_rows_are_read_or_written_in_wide_pieces(kernels: list[dict[str, Any]]) -> None:
    assert offenders(kernels, narrow) == []


def test_no_kernel_adds_floats_in_any_order(kernels: list[dict[str, Any]]) -> None:
    assert offenders(kernels, lambda kernel: kernel["float_atomics"]) == []


def test_what_every_warp_reads_is_written_after_a_barrier(kernels: list[dict[str, Any]]) -> None:
    """A row's step, its one moment, its scales: no warp must change them before all others have read them."""
    updating = [kernel for kernel in kernels if kernel["kernel"] in ("_update_rows", "_fused_update")]
    assert {kernel["kernel"] for kernel in updating} == {"_update_rows", "_fused_update"}
    for kernel in updating:
        one_moment = bool(kernel["arguments"]["ROW_WISE"]["value"])
        scales = kernel["arguments"]["PARTS"]["value"] if "tensor" in kernel["arguments"].get("scales", {}) else 0
        assert kernel["barriers"] == 1 + one_moment + scales, kernel["workload"]


def test_shared_memory_is_enough(kernels: list[dict[str, Any]]) -> None:
    assert offenders(kernels, too_much_shared) == []


def spilled(kernel: dict[str, Any]) -> str:
    return f"{kernel['spilled']} bytes" if kernel["spilled"] else ""


def narrow(kernel: dict[str, Any]) -> str:
    widest = max((each.get("row_bytes", 0) for each in kernel["arguments"].values()), default=0)
    moved = max((int(width) for width in [*kernel["loads"], *kernel["stores"]]), default=0)
    if widest < WIDE_ROW or moved >= WIDE[kernel["target"]]:
        return ""
    return f"loads {kernel['loads']}, stores {kernel['stores']}, rows of {widest} bytes"


def too_much_shared(kernel: dict[str, Any]) -> str:
    return f"{kernel['shared']} bytes" if kernel["shared"] > SHARED_BYTES[kernel["target"]] else ""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What became of kernels that are wrong on purpose, by name, compiled for one target."""
    folder = tmp_path_factory.mktemp("planted")
    launches = [
        launch(kernel, {"BLOCK": block, **({"STEPS": 8} if kernel == "spills" else {})}, warps)
        for kernel, block, warps in (("adds", 128, 4), ("narrow", 512, 4), ("spills", 8192, 1))
    ]
    (folder / "launches.json").write_text(json.dumps({"launches": launches}))
    run("compiled.py", str(folder / "launches.json"), "sm_90", str(folder / "results.json"), interpret=False)
    return {each["kernel"]: each for each in json.loads((folder / "results.json").read_text(encoding="utf-8"))}


def launch(kernel: str, constants: dict[str, int], warps: int) -> dict[str, Any]:
    pointer = {"tensor": "float32", "aligned": True, "row_bytes": 2048}
    arguments = {"x": pointer, "y": pointer} | {name: {"value": value} for name, value in constants.items()}
    options = {"num_warps": warps}
    return {"module": "planted", "kernel": kernel, "arguments": arguments, "options": options, "workload": "planted"}


def test_planted_faults_are_found(planted: dict[str, dict[str, Any]]) -> None:
    assert [kernel.get("failed") for kernel in planted.values()] == [None] * 3
    assert planted["adds"]["float_atomics"]
    assert narrow(planted["narrow"])
    assert spilled(planted["spills"])
    assert not spilled(planted["adds"])
    assert not planted["spills"]["float_atomics"]
    assert too_much_shared({"shared": 1 << 20, "target": "sm_90"})


def test_a_kernel_that_does_not_compile_is_a_result(tmp_path: Path) -> None:
    (tmp_path / "launches.json").write_text(json.dumps({"launches": [launch("missing", {}, 4)]}))
    run("compiled.py", str(tmp_path / "launches.json"), "sm_90", str(tmp_path / "results.json"), interpret=False)
    (found,) = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert "has no attribute 'missing'" in found["failed"]
