"""The checks of correctness at tiny sizes under NVIDIA's compute-sanitizer: memory, races, uninitialised reads."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import Report, SkippedError

HERE = Path(__file__).parent
TOOLKIT = "/usr/local/cuda"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
_FOUND = 99
"""Exit code of the tool where it has found something."""
_TO_READ = 3.0
"""Seconds kept for what the tool has said."""


def find() -> str:
    """Where the tool is: on the path, or with CUDA's toolkit; empty where it is not."""
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")] + [TOOLKIT]
    for path in (None, *(f"{home}/{folder}" for home in homes if home for folder in ("bin", "compute-sanitizer"))):
        if found := shutil.which("compute-sanitizer", path=path):
            return found
    return ""


def run(report: Report) -> None:
    """One row for each tool."""
    for tool in TOOLS:
        report.check(f"triton, {tool}", lambda tool=tool: _checked(report, tool))


def _checked(report: Report, tool: str) -> dict[str, object]:
    program = find()
    if not program:
        raise SkippedError("compute-sanitizer is not on this machine; CUDA's toolkit has it")
    seconds = report.left() / (len(TOOLS) - TOOLS.index(tool))
    with tempfile.TemporaryDirectory() as folder:
        rows, log = Path(folder) / "rows.jsonl", Path(folder) / "log"
        section = [sys.executable, str(HERE / "section.py"), "correctness", "correctness", "run_triton"]
        section += ["--rows", str(rows), "--sizes", "tiny", "--every-row", "{}"]
        section += ["--until", str(time.time() + seconds - 2 * _TO_READ)]
        command = [program, "--tool", tool, "--error-exitcode", str(_FOUND), "--target-processes", "all"]
        rows.touch()
        for name in (".current", ".done"):
            rows.with_suffix(name).touch()
        with log.open("w", encoding="utf-8") as said:
            process = subprocess.Popen([*command, *section], stdout=said, stderr=subprocess.STDOUT)
            try:
                code = process.wait(timeout=max(1.0, seconds - _TO_READ))
            except subprocess.TimeoutExpired:
                code = None
            finally:
                process.kill()
        return outcome(code, log.read_text(encoding="utf-8", errors="replace"), rows.read_text(encoding="utf-8"))


def outcome(code: int | None, said: str, rows: str) -> dict[str, object]:
    """The facts of one tool from its exit code (None: stopped), what it said, and the rows of checks that it saw."""
    checks = sum('"ok"' in line for line in rows.splitlines())
    found = re.findall(r"ERROR SUMMARY: (\d+)", said)
    facts: dict[str, object] = {"checks": checks}
    if found:
        facts["errors"] = sum(map(int, found))
    first = next(
        (line for line in said.splitlines() if re.match(r"=+ (?:Invalid|Error|Race|Uninit|Barrier)", line)), ""
    )
    if code == _FOUND or facts.get("errors"):
        return {"ok": False, **facts, "first": first.strip("= ")[:160]}
    if code is None:
        if not checks:
            raise SkippedError("time was up before its first check")
        return {"ok": True, **facts, "stopped": "time was up"}
    if code:
        raise RuntimeError(f"exit code {code}: {(said.strip().splitlines() or [''])[-1][:160]}")
    return {"ok": checks > 0, **facts}
