"""Studies as jobs of a cluster: what sbatch is given, what a job runs, and what is said."""

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from peerlm import UserError
from peerlm.cli import main
from peerlm_studies.comparison import make_rows
from peerlm_studies.slurm import Share, SlurmConfig, submit

SBATCH = """#!/bin/sh
cp "$1" "{folder}/script.sh"
echo "Submitted batch job 17"
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose commands stand in for SLURM's; the script that sbatch is given lies in it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH.format(folder=folder)), ("srun", "#!/bin/sh\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setattr(make_rows, "prepare_data", lambda data, progress: (folder / "prepared").touch())
    return folder


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    return int(ended.value.code or 0)


def test_a_study_is_one_array_with_a_share_for_each_job(
    study: Any, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["isoflop", str(study.path), "--set=optim.clip=2.0", "--method=PEER", "--seed=2"]
    assert run(*words, "--slurm", "partition=gpu,time=1-2:30:00,mem=64GB,gpus-per-node=1,shards=3", "--json=-") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["jobs"] == ["17_0", "17_1", "17_2"]
    assert shlex.split(said["merge"]) == ["peerlm", *words]
    assert (cluster / "prepared").exists()
    script = (cluster / "script.sh").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", script, flags=re.MULTILINE))
    expected = {"partition": "gpu", "time": str(26 * 60 + 30), "mem": "64GB", "gpus-per-node": "1"}
    assert {key: options[key] for key in expected} == expected
    assert options["array"].startswith("0-2")
    assert options["job-name"] == "peerlm-isoflop"
    assert str(study.plan.output / "slurm") in script
    assert script.index("export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK") < script.index("\nsrun ")


def test_each_job_runs_its_share_and_is_requeued_with_it(
    study: Any, cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import submitit

    submitted: list[Share] = []
    monkeypatch.setattr(submitit.AutoExecutor, "submit_array", lambda self, shares: submitted.extend(shares) or [])
    submit(["compare", "r.toml"], SlurmConfig.read("shards=2"), study.plan.output)
    assert [share.arguments for share in submitted] == [["compare", "r.toml", "--shard", f"{n}/2"] for n in (1, 2)]
    assert submitted[1].checkpoint().function.arguments == submitted[1].arguments
    ran: list[list[str]] = []
    monkeypatch.setattr("peerlm_studies.slurm.subprocess.run", lambda words, check: ran.append(words))
    submitted[1]()
    assert ran == [[sys.executable, "-m", "peerlm", "compare", "r.toml", "--shard", "2/2"]]


@pytest.mark.slow
def test_jobs_on_this_machine_end_as_their_commands_do(tmp_path: Path, study: Any) -> None:
    """The real executor; a share that does not exist is refused by the command, in its log."""
    (job,) = submit(
        ["isoflop", str(tmp_path / "none.toml")], SlurmConfig.read("cluster=local,shards=1"), tmp_path / "s"
    )
    error = job.exception()
    assert "'isoflop', " in str(error)
    assert "returned non-zero exit status 2" in str(error)
    assert "cannot read the recipe" in job.stderr()


def test_the_command_to_type_at_the_end_is_printed(
    study: Any, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("isoflop", str(study.path), "--slurm=shards=2") == 0
    out = capsys.readouterr().out
    assert out == (
        f"2 jobs are submitted: 17_0, 17_1. Their logs are in {study.plan.output}/slurm.\n"
        f"When they have ended, this merges their rows into tables and plots: peerlm isoflop {study.path}\n"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--slurm=shards=2", "--shard=1/2"], "--shard cannot be combined with --slurm"),
        (["--slurm=shards=2", "--dry-run"], "--slurm cannot be combined with --dry-run"),
        (["--slurm=partition=gpu"], "say how many jobs share the rows, as in shards=8"),
        (["--slurm=shards=0"], "say how many jobs share the rows"),
        (["--slurm=shards"], "cannot read 'shards': write KEY=VALUE"),
        (["--slurm=shards=2,time=soon"], "time=soon: write minutes, hours:minutes:seconds"),
        (["--slurm=shards=2,cluster=moon"], "cluster=moon: choose one of slurm, local, debug"),
        (["--slurm=shards=2,partitoin=gpu"], "submitit knows no 'partitoin', but account, "),
        (["--slurm=shards=2,cluster=local,mem=1GB"], "mem is for SLURM alone: leave it out with cluster=local"),
    ],
)
def test_mistakes_are_one_sentence(
    options: list[str], message: str, study: Any, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("isoflop", str(study.path), *options) == 2
    assert message in capsys.readouterr().err
    assert not (cluster / "script.sh").exists()


def test_jobs_that_sbatch_refuses_are_one_sentence(study: Any, cluster: Path) -> None:
    (cluster / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2; exit 1\n")
    with pytest.raises(UserError, match=r"--slurm: sbatch refused the jobs: .*invalid partition"):
        submit(["compare"], SlurmConfig.read("partition=no,shards=2"), study.plan.output)


def test_without_slurm_or_submitit_the_fix_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SlurmConfig.read("shards=2")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no srun on this machine: run this on a login node"):
        submit(["compare"], config, tmp_path)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r'--slurm needs submitit: pip install "peerlm\[slurm\]"'):
        submit(["compare"], config, tmp_path)
