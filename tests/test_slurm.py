"""The job script for SLURM, with stand-ins for the commands of SLURM and torchrun."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "recipes" / "slurm.sh"
SRUN = """#!/bin/bash
echo "$SRUN_CPUS_PER_TASK" > cores
echo "$@" > started
trap 'exit 1' TERM
for _ in $(seq 500); do [ -e finish ] && exit $(cat finish); sleep 0.02; done
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && echo first && echo second || echo "$@" > told
"""


@pytest.fixture
def job(tmp_path: Path) -> "subprocess.Popen[bytes]":
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    numbers = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "nodes",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_CPUS_PER_TASK": "48",
    }
    environment = {**os.environ, **numbers, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    started = subprocess.Popen(["bash", str(SCRIPT), "my.toml", "--output", "run"], cwd=tmp_path, env=environment)
    while not (tmp_path / "started").exists() or not (tmp_path / "started").read_text():
        assert started.poll() is None
        time.sleep(0.01)
    return started


def test_every_node_runs_one_launcher_of_one_command(job: "subprocess.Popen[bytes]", tmp_path: Path) -> None:
    (tmp_path / "finish").write_text("0")
    assert job.wait(10) == 0
    command = (tmp_path / "started").read_text()
    assert "torchrun --nnodes 2 --nproc-per-node 4" in command
    assert "--rdzv-endpoint first:20007" in command
    assert (tmp_path / "cores").read_text() == "48\n"
    assert command.endswith("-m peerlm train my.toml --output run --resume=auto\n")
    assert not (tmp_path / "told").exists()


def test_a_job_whose_time_is_up_is_saved_and_queued_again(job: "subprocess.Popen[bytes]", tmp_path: Path) -> None:
    job.send_signal(signal.SIGTERM)
    assert job.wait(10) == 0
    assert (tmp_path / "told").read_text() == "requeue 7\n"


def test_a_failure_is_not_queued_again(job: "subprocess.Popen[bytes]", tmp_path: Path) -> None:
    (tmp_path / "finish").write_text("3")
    assert job.wait(10) == 3
    assert not (tmp_path / "told").exists()
