"""Every Triton kernel compiled for this card, on all cores: later sections find it in Triton's cache."""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from machine import ROOT
from report import Report, SkippedError

SCRIPTS = ROOT / "tests/ops/triton"
"""What the ahead-of-time tests record launches and compile with."""
_LEAST = 10.0
_WITHOUT_GPU = "cuda:90:32"


def run(report: Report) -> None:
    """One row for each launch: spilled registers, shared memory, or why it does not compile."""
    with TemporaryDirectory() as folder:
        launches = report.attempt("launches", lambda: _launches(report, Path(folder)))
        if launches is None:
            return
        for name, why in launches["failed"].items():
            report.row(f"launches of {name}", failed=why)
        for found in report.attempt("compile", lambda: _compiled(report, Path(folder), launches["launches"])) or []:
            facts = {name: found[name] for name in ("spilled", "shared", "float_atomics") if found.get(name)}
            if "failed" in found:
                facts["failed"] = found["failed"].splitlines()[0][:200]
            else:
                facts["ok"] = not found.get("spilled") and not found["float_atomics"]
            report.row(f"{found['module'].rpartition('.')[2]}.{found['kernel']}, {found['workload']}", **facts)


def _launches(report: Report, folder: Path) -> dict[str, object]:
    """What the operators launch at real shapes, recorded in the interpreter."""
    if not SCRIPTS.is_dir():
        raise SkippedError("the tests, which record launches, are not here")
    file = folder / "launches.json"
    which = "all" if report.device == "cuda" else "ceilings"
    _finished([_started("launches.py", str(file), which, interpret=True)], report)
    return json.loads(file.read_text(encoding="utf-8"))


def _compiled(report: Report, folder: Path, launches: list[object]) -> list[dict[str, object]]:
    """What became of each launch; as many processes as there are cores."""
    target = _WITHOUT_GPU
    if report.device == "cuda":
        import triton

        here = triton.runtime.driver.active.get_current_target()
        target = f"{here.backend}:{here.arch}:{here.warp_size}"
    parts = min(os.cpu_count() or 1, 16, len(launches)) if report.device == "cuda" else 1
    processes = []
    for part in range(parts):
        (folder / f"{part}.json").write_text(json.dumps({"launches": launches[part::parts]}), encoding="utf-8")
        arguments = str(folder / f"{part}.json"), target, str(folder / f"{part}.results")
        processes.append(_started("compiled.py", *arguments, interpret=False))
    _finished(processes, report)
    results = [folder / f"{part}.results" for part in range(parts)]
    return [found for file in results for found in json.loads(file.read_text(encoding="utf-8"))]


def _started(script: str, *arguments: str, interpret: bool) -> "subprocess.Popen[str]":
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def _finished(processes: "list[subprocess.Popen[str]]", report: Report) -> None:
    for process in processes:
        try:
            _, errors = process.communicate(timeout=max(_LEAST, report.left()))
        finally:
            process.kill()
        if process.returncode:
            raise RuntimeError((errors.strip() or f"exit code {process.returncode}").splitlines()[-1])
