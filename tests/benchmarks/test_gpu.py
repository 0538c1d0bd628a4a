"""The script that measures a GPU: all of it runs without one, and whatever fails in it is a row."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from peerlm.testing import exhaustive_search

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks/gpu/run.py"
NOT_THERE = ("transformers", "tokenizers", "safetensors", "rich", "typer", "tomli", "einops", "einx", "PEER_pytorch")
"""What a machine with torch, triton and numpy alone has not."""
WITHOUT = f"""
import importlib.abc, importlib.machinery, sys

class Missing(importlib.abc.Loader):
    def create_module(self, spec):
        raise ModuleNotFoundError(f"No module named {{spec.name!r}}", name=spec.name)

    def exec_module(self, module):
        pass

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "peerlm.ops.cpu._native" or name.partition(".")[0] in {NOT_THERE!r}:
            return importlib.machinery.ModuleSpec(name, Missing())

sys.meta_path.insert(0, Finder())
"""

pytestmark = pytest.mark.slow


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of `benchmarks/gpu` can be imported, until the test ends."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(SCRIPT.parent) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def run(*arguments: str, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope="module")
def faulty_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple["subprocess.Popen[bytes]", Path]]:
    """A process that runs sections that fail, one of them by its deadline, and the file of its rows."""
    output = tmp_path_factory.mktemp("faulty") / "rows.jsonl"
    code = (
        "from pathlib import Path; from processes import run_sections; from sections import Section\n"
        "names = {'cases': ('cases', 40), 'none': ('before_any_case', 40), 'hangs': ('hangs', 9)}\n"
        "sections = [Section(name, 'faulty', *rest, '') for name, rest in names.items()]\n"
        f"run_sections(sections, Path({str(output)!r}), sizes='tiny', every_row={{'commit': 'c'}}, seconds=120,"
        " environment={})"
    )
    path = os.pathsep.join([str(SCRIPT.parent), str(Path(__file__).parent), str(ROOT / "src")])
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path})
    yield process, output
    if process.poll() is None:
        process.send_signal(signal.SIGINT)  # upon which it ends the processes that it started
        process.wait()


@pytest.fixture(scope="module")
def short_run(faulty_process: object, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    """What a section says and writes where torch, triton and numpy are all that is there.

    Meanwhile the other process waits for its deadline.
    """
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "sitecustomize.py").write_text(WITHOUT, encoding="utf-8")
    output = folder / "out/rows.jsonl"
    done = run("--only", "kernels", "--output", str(output), "--interpret", PYTHONPATH=str(folder))
    assert done.returncode == 0, done.stderr
    return done.stdout, rows_of(output)


def test_sections_run_without_a_gpu_and_with_torch_alone(short_run: tuple[str, list[dict[str, Any]]]) -> None:
    _, rows = short_run
    measured = {row["case"] for row in rows if "ms" in row}
    assert {"experts forward / gather alone", "experts forward / peerlm, reference"} <= measured
    unexpected = [row for row in rows if "failed" in row and "triton" not in row["case"]]
    assert unexpected == []


def test_every_row_says_where_it_was_measured(short_run: tuple[str, list[dict[str, Any]]]) -> None:
    _, rows = short_run
    for row in rows:
        assert row["torch"] == torch.__version__
        assert (row["interpreted"], row["sizes"], row["card"]) == (True, "tiny", "")
        assert row["triton"]
        assert re.fullmatch(r"[0-9a-f]{12}(\+changes)?|unknown", row["commit"])


def test_the_table_fits_80_columns_and_has_every_row(short_run: tuple[str, list[dict[str, Any]]]) -> None:
    said, rows = short_run
    table = said[said.index("== kernels") :].splitlines()
    assert max(map(len, table[:-1])) <= 80
    assert len([line for line in table if re.search(r"\d\.\d{4}", line)]) >= sum("ms" in row for row in rows)


def test_ratios_are_to_the_first_of_a_case(short_run: tuple[str, list[dict[str, Any]]]) -> None:
    _, rows = short_run
    first, *others = [row for row in rows if row["case"].startswith("row update /") and row["rows"] == "float32"]
    assert first["ratio"] == 1
    for row in others:
        assert row["ratio_to"] == first["contender"]
        assert row["ratio"] == pytest.approx(row["ms"] / first["ms"], abs=1e-4)


@pytest.fixture(scope="module")
def faulty_run(faulty_process: tuple["subprocess.Popen[bytes]", Path]) -> list[dict[str, Any]]:
    """The rows of sections that fail."""
    process, output = faulty_process
    assert process.wait(timeout=200) == 0
    return rows_of(output)


def test_a_failure_is_a_row_with_its_first_line(faulty_run: list[dict[str, Any]]) -> None:
    row = next(row for row in faulty_run if row["case"] == "wrong")
    assert row["failed"].startswith("RuntimeError: inconsistent tensor size")
    assert (row["tokens"], row["commit"]) == (7, "c")


def test_out_of_memory_is_a_row(faulty_run: list[dict[str, Any]]) -> None:
    row = next(row for row in faulty_run if row["case"] == "large")
    assert row["out_of_memory"] is True
    assert row["failed"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 8 GiB."


def test_a_section_starts_again_after_a_crash_without_the_case_that_crashed(faulty_run: list[dict[str, Any]]) -> None:
    section = [row for row in faulty_run if row["section"] == "cases"]
    crash = [row for row in section if row["case"] == "ends the process"]
    assert [row["failed"] for row in crash] == ["ended by SIGSEGV"]
    one, two = (row for row in section if row["case"].startswith("timed"))
    assert (one["ratio"], two["ratio_to"]) == (1, "one")
    assert two["ms"] >= 1
    assert [row["case"] for row in section].count("wrong") == 1


def test_a_section_starts_again_when_the_device_is_lost(faulty_run: list[dict[str, Any]]) -> None:
    lost = [row for row in faulty_run if row["case"] == "loses the device"]
    assert [row["failed"] for row in lost] == ["RuntimeError: CUDA error: an illegal memory access was encountered"]


def test_a_section_that_fails_before_its_first_case_is_a_row(faulty_run: list[dict[str, Any]]) -> None:
    (row,) = [row for row in faulty_run if row["section"] == "none"]
    assert row["failed"] == "RuntimeError: no card to be found"


def test_a_section_over_its_deadline_is_stopped_and_says_in_which_case(faulty_run: list[dict[str, Any]]) -> None:
    before, stopped = [row for row in faulty_run if row["section"] == "hangs"]
    assert before["ok"] is True
    assert stopped["failed"] == "over its deadline of 9 s"
    assert stopped["case"] == "waits"


@pytest.mark.usefixtures("modules")
def test_no_section_starts_when_the_time_is_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from processes import run_sections
    from sections import SECTIONS

    file = tmp_path / "rows.jsonl"
    run_sections(SECTIONS, file, sizes="tiny", every_row={}, seconds=0, environment={})
    assert [row["skipped"] for row in rows_of(file)] == ["time is up"] * len(SECTIONS)


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pairing", ["row-major", "shells"])
def test_the_search_on_the_device_is_that_of_the_tests(pairing: str, dtype: torch.dtype) -> None:
    import oracle
    import retrieval_checks

    for name, make in retrieval_checks.KEYS.items():
        query, keys = (each.to(dtype) for each in make(3, 2, 12, 4))
        ids, scores = oracle.exhaustive_search(query, keys, 9, pairing)
        exact_ids, exact_scores = exhaustive_search(query, keys, 9, pairing)
        torch.testing.assert_close(scores, exact_scores, rtol=1e-14, atol=1e-14)
        assert torch.equal(ids, exact_ids), name


@pytest.mark.usefixtures("modules")
def test_wrong_ids_fail_the_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import retrieval_checks
    from report import Report
    from rows import Progress
    from sizes import TINY

    from peerlm.ops import api

    Progress(tmp_path / "rows.jsonl").clear()
    report = Report("test", tmp_path / "rows.jsonl", TINY, {}, until=float("inf"))
    arguments = (report, "reference", retrieval_checks.normal_keys, torch.float32, (4, 2, 16, 4), 4)
    assert retrieval_checks._ids(*arguments)["ok"] is True
    right = api.retrieve
    monkeypatch.setattr(
        api, "retrieve", lambda *given, **names: (right(*given, **names)[0], right(*given, **names)[1] ^ 1)
    )
    assert retrieval_checks._ids(*arguments)["ok"] is False


@pytest.mark.usefixtures("modules")
def test_another_optimizer_fails_the_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import row_checks
    from report import Report
    from rows import Progress
    from sizes import TINY

    Progress(tmp_path / "rows.jsonl").clear()
    report = Report("test", tmp_path / "rows.jsonl", TINY, {}, until=float("inf"))
    assert row_checks._as_dense(report)["ok"] is True
    monkeypatch.setitem(row_checks.BITS, "exact, float32", (torch.float32, {"lazy": True}))
    assert row_checks._as_dense(report)["ok"] is False


@pytest.mark.usefixtures("modules")
def test_goals_are_found_in_rows() -> None:
    import goals

    def row(section: str, case: str, contender: str, **figures: Any) -> dict[str, Any]:
        return {"section": section, "case": f"{case} / {contender}", "contender": contender, **figures}

    rows = [
        row("kernels", "experts forward", "gather alone", ms=1.5, dim=1024, ids="uniform", tokens=8192),
        row("kernels", "experts forward", "peerlm, triton", ms=2.0, dim=1024, ids="uniform", tokens=8192),
        row("layer", "step", "PEER-pytorch", ms=50.0),
        row("layer", "step", "peerlm, triton", ms=10.0),
        row("many-tokens", "step", "PEER-pytorch", failed="OutOfMemoryError", out_of_memory=True),
        row("many-tokens", "step", "peerlm, triton", ms=90.0),
        row("one-head", "backward", "dense, 4 D neurons", ms=3.0, tokens=65536),
        row("one-head", "backward", "peerlm, triton", ms=6.0, tokens=65536),
        row("one-head", "step", "dense, 4 D neurons", ms=3.0, tokens=8192),
        row("one-head", "step", "peerlm, triton", ms=2.0, tokens=8192),
        {"section": "language-model", "case": "PEER, triton, graph", "tokens_per_s": 300, "share_of_peak": 0.25},
        {"section": "language-model", "case": "PEER, reference", "tokens_per_s": 100},
        {"section": "correctness", "case": "triton, share searched whole, trained keys", "ok": True, "share": 0.0125},
        {"section": "graphs", "case": "triton, a", "ok": True},
        {"section": "graphs", "case": "triton, graph of a step has eager bits, exact AdamW", "failed": "RuntimeError"},
        {"section": "graphs", "case": "reference, a", "ok": False},
    ]
    found = {line[:60].strip(): line[60:].split() for line in goals.lines(rows)}
    assert found["experts forward, share of the gather limit, D=1024, uniform"] == ["0.88", "0.75", "!"]
    assert found["experts forward, share of the gather limit, D=1024, zipf"] == ["0.88", "-"]
    assert found["step, times as fast as PEER-pytorch"] == ["4.00", "5.00"]
    assert found["a step of 65,536 tokens; PEER-pytorch is out of memory"] == ["1.00", "1.00"]
    assert found["checks of synchronisation and graphs that are right"] == ["1.00", "0.50", "!"]
    assert found["one head, step, T=8,192, times as fast as dense 4 D"] == ["1.00", "1.50"]
    assert found["one head, backward, T=65,536, times as fast as dense 4 D"] == ["0.5"]
    assert found["graph replay has the bits of eager steps"] == ["1.00", "0.00", "!"]
    assert found["two runs have the same bits"] == ["1.00", "-"]
    assert found["language model, tokens per second, PEER after over before"] == ["3"]
    assert found["language model, tokens per second, PEER over equal FLOPs"] == ["-"]
    assert found["language model, share of peak, PEER, triton, graph"] == ["0.25"]
    assert found["share of searches that needed the fallback, trained keys"] == ["0.0125"]
    assert max(map(len, goals.lines(rows))) <= 80


@pytest.mark.usefixtures("modules")
def test_what_compute_sanitizer_finds_is_a_row() -> None:
    from report import SkippedError
    from sanitizer import outcome

    rows = '{"case": "a", "ok": true}\n{"case": "b", "ok": false}\n{"case": "c", "skipped": "no"}\n'
    clean, dirty = (
        "========= ERROR SUMMARY: 0 errors",
        "========= Invalid __global__ read\n========= ERROR SUMMARY: 2 errors",
    )
    assert outcome(0, clean, rows) == {"ok": True, "checks": 2, "errors": 0}
    assert outcome(99, dirty, rows) == {"ok": False, "checks": 2, "errors": 2, "first": "Invalid __global__ read"}
    assert outcome(None, "", rows) == {"ok": True, "checks": 2, "stopped": "time was up"}
    assert outcome(0, clean, "")["ok"] is False
    with pytest.raises(SkippedError, match="before its first check"):
        outcome(None, "", "")
    with pytest.raises(RuntimeError, match="exit code 1: no device"):
        outcome(1, "no device\n", rows)


@pytest.mark.usefixtures("modules")
def test_compute_sanitizer_runs_the_checks_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sanitizer
    from report import Report
    from rows import Progress
    from sizes import TINY

    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        f"#!{sys.executable}\nimport sys\n"
        "arguments = sys.argv\nassert 'run_triton' in arguments and '--tool' in arguments\n"
        "open(arguments[arguments.index('--rows') + 1], 'a').write('{\"case\": \"a\", \"ok\": true}\\n')\n"
        "print('========= ERROR SUMMARY: 0 errors')\n"
    )
    tool.chmod(0o755)
    file = tmp_path / "rows.jsonl"
    for path in (str(tmp_path), ""):
        Progress(file).clear()
        monkeypatch.setenv("PATH", path)
        monkeypatch.setenv("CUDA_HOME", "")
        monkeypatch.setattr(sanitizer, "TOOLKIT", str(tmp_path / "none"))
        sanitizer.run(Report("sanitizer", file, TINY, {}, until=time.time() + 60))
    found = rows_of(file)
    assert [row.get("checks") for row in found] == [1] * 4 + [None] * 4
    assert [row["ok"] for row in found[:4]] == [True] * 4
    assert {row["skipped"] for row in found[4:]} == {"compute-sanitizer is not on this machine; CUDA's toolkit has it"}


@pytest.mark.usefixtures("modules")
def test_every_section_is_a_function_that_exists() -> None:
    from importlib import import_module

    from sections import SECTIONS

    pytest.importorskip("triton")
    for section in SECTIONS:
        module: ModuleType = import_module(section.module)
        assert callable(getattr(module, section.function))


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize(
    "name", ["correctness", "layer", "many-tokens", "one-head", "graphs", "language-model", "cached-rows", "memory"]
)
def test_a_section_measures_what_is_there(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from importlib import import_module

    import contenders
    from report import Report, SkippedError
    from rows import Progress
    from sections import SECTIONS
    from sizes import TINY

    def reference_alone(backend: str) -> None:
        if backend != "reference":
            raise SkippedError(f"no {backend}")

    pytest.importorskip("triton")
    section = next(each for each in SECTIONS if each.name == name)
    module = import_module(section.module)
    for each in [*sys.modules.values()]:
        if getattr(each, "check_backend", None) is contenders.check_backend and each is not contenders:
            monkeypatch.setattr(each, "check_backend", reference_alone)
    monkeypatch.setattr(contenders, "check_backend", reference_alone)
    file = tmp_path / "rows.jsonl"
    Progress(file).clear()
    getattr(module, section.function)(Report(name, file, TINY, {}, until=float("inf")))
    rows = rows_of(file)
    assert [row for row in rows if "failed" in row] == []
    assert any(row.get("ok") or "ms" in row or "tokens_per_s" in row or "peak_GiB" in row for row in rows) or (
        {row["skipped"] for row in rows} >= {"it runs; only a GPU can be waited for"}
    )


def test_help_names_every_section() -> None:
    done = run("--help")
    assert done.returncode == 0
    for name in ("ceilings", "correctness", "language-model", "--prepare"):
        assert name in done.stdout


@pytest.mark.parametrize(
    ("package", "content", "said"),
    [
        (
            "numpy",
            "raise ModuleNotFoundError(name='numpy')",
            "numpy is not installed, and this needs it: pip install 'numpy>=1'",
        ),
        (
            "torch",
            "__version__ = '2.10.1+cu128'",
            "torch is 2.10.1+cu128, and this needs 2.11 or newer: pip install 'torch>=2.11'",
        ),
        ("triton", "__version__ = '3.5.0'", "triton is 3.5.0, and this needs 3.6 or newer: pip install 'triton>=3.6'"),
        (
            "triton",
            "raise ImportError('libcuda is not there')",
            "triton cannot be imported (libcuda is not there), and this needs it: pip install 'triton>=3.6'",
        ),
    ],
)
def test_a_package_that_is_missing_or_too_old_ends_the_run_with_one_sentence(
    package: str, content: str, said: str, tmp_path: Path
) -> None:
    for name, there in {"numpy": "2.0", "torch": "2.13.0", "triton": "3.7.1"}.items():
        text = content if name == package else f"__version__ = {there!r}"
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    done = run("--output", str(tmp_path / "rows.jsonl"), PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == f"run.py: {said}\n"
    assert done.stdout == ""
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.usefixtures("modules")
def test_a_driver_that_hangs_ends_the_run_with_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import machine

    monkeypatch.setattr(machine, "_MOST_SECONDS", 0.01)
    with pytest.raises(RuntimeError, match=r"torch did not say within 0.01 s which card there is: see if nvidia-smi"):
        machine.description({})
