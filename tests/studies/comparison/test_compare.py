"""The main job, for real and tiny: runs, rows, table, plot, sample, and going on where it was stopped."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from peerlm import UserError
from peerlm.cli import main
from peerlm.errors import TrainingStopped
from peerlm_studies.comparison.compare import compare
from peerlm_studies.rows import read_rows

from ...processes import start

RECIPE = """
run = "{folder}/out"
[data]
folder = "{folder}/tokens"
sources = ["{folder}/books"]
vocab_size = 300
holdout = 0.2
context = 16
batch_size = 4
[model]
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
max_position_embeddings = 16
[budget]
flops = 1e8
[eval]
every = 5
windows = 4
final_windows = 8
[compare]
evaluate = ["{folder}/other.txt"]
evaluate_limit = 200
sample_tokens = 5
[methods.dense.model]
ffw_layers = "dense"
[methods.peer.model]
ffw_layers = "peer"
peer = {{ num_experts = 16, heads = 2, experts_per_head = 2, key_dim = 4 }}
"""


def write_books(folder: Path) -> None:
    """What `RECIPE` reads."""
    (folder / "books").mkdir()
    for book in range(10):
        lines = [f"Line {line} of book {book} tells of {line * book} ships at sea." for line in range(60)]
        (folder / "books" / f"{book}.txt").write_text("\n".join(lines))
    (folder / "other.txt").write_text("Another book tells of a ship. " * 20)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_books(tmp_path)
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(folder=tmp_path))
    return path


class Forked:
    """In place of `subprocess.Popen` of a command of peerlm: the command, forked from a process that is warm."""

    def __init__(self, command: list[str], **options: object) -> None:
        assert command[:3] == [sys.executable, "-m", "peerlm"]
        assert options["stdout"] == subprocess.DEVNULL
        self._output = Path(tempfile.mkdtemp()) / "said"
        self._process = start(self._output, options["env"], main, command[3:])
        self.returncode: int | None = None

    def communicate(self) -> tuple[None, bytes]:
        self._process.join()
        self.returncode = self._process.exitcode
        said = self._output.read_bytes()
        shutil.rmtree(self._output.parent)
        return None, said

    def terminate(self) -> None:
        self._process.terminate()


def forking() -> SimpleNamespace:
    """In place of the module subprocess."""
    return SimpleNamespace(Popen=Forked, DEVNULL=subprocess.DEVNULL, PIPE=subprocess.PIPE)


@pytest.fixture
def forked_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peerlm_studies.processes.subprocess", forking())


@pytest.mark.slow
@pytest.mark.usefixtures("forked_commands")
def test_a_comparison_leaves_rows_table_plot_and_sample_and_goes_on(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = compare(recipe, progress=False)
    output = tmp_path / "out"
    rows = read_rows(output / "rows.jsonl")
    assert [row["method"] for row in rows] == ["dense", "peer"]
    for row in rows:
        flops = row["summary"]["flops"]
        step = row["summary"]["training_flops_per_token"] * 16 * 4
        assert flops <= 1e8 < flops + step
        assert row["curve"][-1]["validation_loss"] == row["summary"]["validation_loss"]
        assert row["evaluation"]["other"]["perplexity"] > 1
    assert [entry["label"] for entry in table] == ["dense", "peer"]
    assert table == json.loads((output / "table.json").read_text())
    assert table[0]["usage"] is None
    assert 0 < table[1]["usage"] <= 1
    assert "| peer |" in (output / "table.md").read_text()
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    frontier = {point["label"]: point for point in json.loads((output / "frontier.json").read_text())}
    assert frontier["peer"]["row_bytes"] == 2 * 2 * 2 * 16 * 4  # heads, experts of each, vectors, width, bytes
    assert frontier["dense"]["row_bytes"] == 0
    assert len((output / "sample.txt").read_text()) > 3

    kept, lost = (output / "rows.jsonl").read_text().splitlines()
    (output / "rows.jsonl").write_text(f"{kept}\n{lost[:40]}")
    assert compare(recipe, progress=False) == table
    again = read_rows(output / "rows.jsonl")
    assert again[0] == rows[0]
    assert again[1]["summary"]["validation_loss"] == rows[1]["summary"]["validation_loss"]

    with pytest.raises(UserError, match=r"dense-seed=0 is done and was measured with eval.copying = False, not True: "):
        compare(recipe, ["eval.copying=true"], progress=False)
    assert read_rows(output / "rows.jsonl") == again

    for run in (output / "runs").iterdir():
        (run / "model").rename(run / "elsewhere")
    compare(recipe)
    assert "Table, plots and rows are in" in capsys.readouterr().out

    monkeypatch.setattr("peerlm_studies.comparison.compare._write_sample", lambda plan: "text in [/b] brackets")
    compare(recipe)
    said = capsys.readouterr().out
    assert "peer writes: text in [/b] brackets" in said
    assert "Table, plots, rows and sample are in" in said


@pytest.mark.slow
@pytest.mark.usefixtures("forked_commands")
def test_runs_that_have_their_rows_leave_the_model_that_writes_the_sample(tmp_path: Path, recipe: Path) -> None:
    settings = ["compare.keep=rows", "compare.evaluate=[]"]
    compare(recipe, settings, progress=False)
    runs = tmp_path / "out" / "runs"
    assert {path.parent.name.partition("-")[0] for path in runs.glob("*/model")} == {"peer"}
    assert {path.parent.name.partition("-")[0] for path in runs.glob("*/log.jsonl")} == {"dense", "peer"}
    assert not list(runs.glob("*/checkpoints"))
    assert (tmp_path / "out" / "sample.txt").exists()
    before = (tmp_path / "out" / "rows.jsonl").read_bytes()
    compare(recipe, settings, progress=False)
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == before


@pytest.mark.slow
@pytest.mark.usefixtures("forked_commands")
def test_a_run_that_fails_carries_its_exit_code(recipe: Path) -> None:
    with pytest.raises(
        TrainingStopped, match="peerlm train of dense, seed 0, ended with exit code 3: training stopped at step"
    ) as error:
        compare(recipe, ["optim.learning_rate=1e30", "optim.clip=1e30"], progress=False)
    assert error.value.exit_code == 3


def main_of_a_session(arguments: list[str]) -> None:
    """The command, and the commands that it starts, as a group of processes."""
    os.setsid()
    main(arguments)


@pytest.mark.slow
def test_sigterm_ends_the_runs_too_and_the_comparison_goes_on(tmp_path: Path, recipe: Path) -> None:
    arguments = ["compare", str(recipe), "--json=-", "--set", "budget.minutes=9"]
    endless = start(tmp_path / "said", {}, main_of_a_session, arguments)
    logs = tmp_path / "out" / "runs"
    while not any(logs.glob("*/log.jsonl")):
        assert endless.exitcode is None, (tmp_path / "said").read_text()
        time.sleep(0.1)
    endless.terminate()
    endless.join(60)
    assert endless.exitcode == 143
    assert "stopped by SIGTERM; finished runs are kept" in (tmp_path / "said").read_text()
    with pytest.raises(ProcessLookupError):
        os.killpg(endless.pid, 0)
    assert any(logs.glob("*/checkpoints/step-*"))


def test_a_missing_evaluation_file_is_found_before_training(tmp_path: Path, recipe: Path) -> None:
    with pytest.raises(UserError, match=r"compare.evaluate names .*missing.txt, which does not exist"):
        compare(recipe, [f'compare.evaluate=["{tmp_path}/missing.txt"]'], progress=False)
    assert not (tmp_path / "out" / "runs").exists()
