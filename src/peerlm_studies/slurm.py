"""A study as an array of SLURM jobs, one for each share of its rows, by submitit."""

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peerlm.errors import UserError, listed

CLUSTERS = ("slurm", "local", "debug")
"""SLURM; processes on this machine; this process, one after another."""


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """What `--slurm` says."""

    shards: int
    """Jobs of the array, each with its share of the rows."""
    cluster: str = "slurm"
    minutes: int | None = None
    """Time of each job; a job that needs more is requeued and resumes."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """Of sbatch, by submitit's names."""

    @classmethod
    def read(cls, text: str) -> "SlurmConfig":
        """From "partition=gpu,time=8:00:00,shards=8"; raises UserError where that cannot be read."""
        values: dict[str, Any] = {}
        for part in text.split(","):
            key, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals or not key or not value:
                raise UserError(f"--slurm: cannot read {part!r}: write KEY=VALUE,KEY=VALUE, as partition=gpu,shards=8")
            values[key.replace("-", "_")] = int(value) if value.isdigit() else value
        shards, cluster, time = values.pop("shards", None), values.pop("cluster", "slurm"), values.pop("time", None)
        if not isinstance(shards, int) or shards < 1:
            raise UserError("--slurm: say how many jobs share the rows, as in shards=8")
        if cluster not in CLUSTERS:
            raise UserError(f"--slurm: cluster={cluster}: choose one of {', '.join(CLUSTERS)}")
        return cls(shards=shards, cluster=cluster, minutes=_minutes(time), parameters=values)


def _minutes(time: int | str | None) -> int | None:
    """Minutes of a time as sbatch takes it: minutes, hours:minutes:seconds, or days before that and a hyphen."""
    if time is None or isinstance(time, int):
        return time
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d)(?::(\d\d))?", time)
    if match is None:
        raise UserError(f"--slurm: time={time}: write minutes, hours:minutes:seconds, or days-hours:minutes:seconds")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return 60 * (24 * days + hours) + minutes + (seconds > 0)


class Share:
    """A job: `peerlm` with these arguments. When its time is over, submitit requeues it, and finished rows are kept."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.arguments = list(arguments)

    def __call__(self) -> None:
        """Run to the end; raises `CalledProcessError` with the command's exit code."""
        subprocess.run([sys.executable, "-m", "peerlm", *self.arguments], check=True)

    def checkpoint(self) -> Any:
        """What submitit runs after a time-out or preemption."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


_CORES = '[ -z "$SLURM_CPUS_PER_TASK" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK'
"""Since SLURM 22.05 srun, by which submitit starts a job, does not take --cpus-per-task over by itself."""


def submit(command: Sequence[str], config: SlurmConfig, folder: Path) -> list[Any]:
    """Submit a command once for each of N shares of its rows, as one array.

    Args:
        command: arguments of peerlm, without --shard.
        config: the jobs.
        folder: for submitit's files and the jobs' logs.

    Returns:
        submitit's jobs, of which `job_id` is SLURM's.

    Raises:
        UserError: submitit is not installed, there is no SLURM here, or it does not take a parameter.
    """
    try:
        import submitit
    except ImportError as error:
        raise UserError('--slurm needs submitit: pip install "peerlm[slurm]"') from error
    parameters: dict[str, Any] = {}
    if config.minutes is not None:
        parameters["timeout_min"] = config.minutes
    if config.cluster == "slurm":
        known = submitit.SlurmExecutor._valid_parameters()
        for name in config.parameters:
            if name not in known:
                raise UserError(f"--slurm: submitit knows no {name!r}, but {listed(sorted(known), most=40)}")
        parameters |= {f"slurm_{name}": value for name, value in config.parameters.items()}
        parameters.setdefault("slurm_job_name", f"peerlm-{command[0]}")
        parameters.setdefault("slurm_setup", [_CORES])
    elif config.parameters:
        raise UserError(f"--slurm: {listed(config.parameters)} is for SLURM alone: leave it out with cluster=local")
    try:
        executor = submitit.AutoExecutor(folder, cluster=config.cluster)
    except RuntimeError as error:
        raise UserError(
            "--slurm: there is no srun on this machine: run this on a login node of the cluster, or add cluster=local"
        ) from error
    executor.update_parameters(**parameters)
    shares = [Share([*command, "--shard", f"{number}/{config.shards}"]) for number in range(1, config.shards + 1)]
    try:
        return list(executor.submit_array(shares))
    except submitit.core.utils.FailedJobError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--slurm: sbatch refused the jobs: {reason}") from error
