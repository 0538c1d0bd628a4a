"""Foreign tests: failures need a listed reason, and a reason that is not needed any more is a failure."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOREIGN = Path(__file__).parents[1] / "foreign"
SUITE = """
import unittest
class Suite(unittest.TestCase):
    def test_passes(self): pass
    def test_fails(self): self.fail()
    def test_fails_in_parts(self):
        for part in (1, 2):
            with self.subTest(part): assert part == 1
    def test_rounds_a(self): self.fail()
    def test_rounds_b(self): pass
    def test_asks(self): raise OSError("We couldn't connect to the hub")
"""
LISTED = [
    ("Suite::test_fails*", "fails", "it is known"),
    ("Suite::test_rounds_*", "may fail", "it rounds"),
]


def run(folder: Path, exceptions: list[tuple[str, str, str]]) -> subprocess.CompletedProcess[str]:
    for name in ("conftest.py", "pytest.ini"):
        shutil.copyfile(FOREIGN / name, folder / name)
    (folder / "some_suite.py").write_text(SUITE)
    (folder / "exceptions.toml").write_text(
        "\n".join(
            f'[[exception]]\nsuite = "some_suite"\ntests = ["{tests}"]\noutcome = "{outcome}"\nreason = "{reason}"'
            for tests, outcome, reason in exceptions
        )
    )
    command = [sys.executable, "-m", "pytest", "-c", "pytest.ini", "some_suite.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.slow
def test_listed_failures_pass_and_are_counted_by_reason(tmp_path: Path) -> None:
    outcome = run(tmp_path, LISTED)
    assert outcome.returncode == 0, outcome.stdout
    for line in ("excepted    1: it rounds", ": it is known", "skipped    1: needs a model of the hub"):
        assert line in outcome.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("exceptions", "said"),
    [
        (LISTED[1:], "2 failed"),
        ([*LISTED, ("Suite::test_passes", "fails", "once")], "STALE: some_suite.py::Suite::test_passes did not fail"),
        ([*LISTED, ("Suite::test_p*", "may fail", "once")], "STALE: none of ['Suite::test_p*'] fails (once)"),
        ([*LISTED, ("Suite::test_gone", "skip", "once")], "STALE: no test matches ['Suite::test_gone'] (once)"),
    ],
    ids=["unlisted", "passes", "none fails", "no such test"],
)
def test_what_is_not_listed_or_not_needed_fails(
    exceptions: list[tuple[str, str, str]], said: str, tmp_path: Path
) -> None:
    outcome = run(tmp_path, exceptions)
    assert outcome.returncode == 1, outcome.stdout
    assert said in outcome.stdout
