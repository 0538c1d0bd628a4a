"""Memory that is freed stays with the process."""

import os
import platform
import subprocess
import sys

import pytest

from peerlm.cli import main
from peerlm.malloc import keep_freed_memory

FAULTS = """
import resource, torch
from peerlm.malloc import keep_freed_memory
print(keep_freed_memory())
for turn in range(40):
    if turn == 30:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _without_mallocs_own() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}


def _kept_and_faults(**environment: str) -> tuple[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS],
        check=True,
        capture_output=True,
        text=True,
        env=_without_mallocs_own() | environment,
    )
    kept, faults = done.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have other allocators")
def test_pages_of_a_freed_block_are_not_asked_for_again() -> None:
    kept, faults = _kept_and_faults()
    assert kept == "True"
    without, faults_without = _kept_and_faults(MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="33554432")
    assert without == "False"
    assert faults < 10 <= faults_without  # ten blocks of 64 MiB, of at least one page each


def test_what_the_environment_says_counts_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")
    assert not keep_freed_memory()


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()


def test_commands_keep_what_they_free(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    monkeypatch.setattr("peerlm.cli.keep_freed_memory", lambda: kept.append(True))
    with pytest.raises(SystemExit, match="0"):
        main(["info"])
    assert kept == [True]
