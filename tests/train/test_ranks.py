"""Two processes train as one does."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peerlm.cli import main
from peerlm.files import write_json
from peerlm.ranks import join_ranks
from peerlm.testing import float64 as float64_
from peerlm.train import TrainConfig, train
from peerlm.train.checkpoint import list_checkpoints
from peerlm.train.recipe import to_dict

from ..processes import ranks

MEETING = """
import torch
from peerlm.ranks import join_ranks
with join_ranks("cpu") as ranks:
    number = torch.tensor(float(not ranks.is_main))
    found = ranks.mean(number).item(), ranks.of_main(number.item()), ranks.any(not ranks.is_main)
    print("{} {} {}\\n".format(*found), end="")  # in one piece: the processes share a pipe
"""


def train_in_float64(recipe: Path) -> None:
    with float64_():
        main(["train", str(recipe)])


@pytest.fixture
def without_dropout(recipe: dict[str, Any]) -> dict[str, Any]:
    """Statistics of the batch, of queries and of experts' load, must be those of both processes."""
    layers = {
        "ffw_layers": ["fine_grained_moe", "peer"],
        "fine_grained_moe": {"num_experts": 4, "experts_per_token": 2},
    }
    return {**recipe["model"], **layers, "attention_dropout": 0.0, "peer": {**recipe["model"]["peer"], "dropout": 0.0}}


@pytest.mark.slow
def test_processes_of_torchrun_meet(tmp_path: Path) -> None:
    """What tests of ranks leave out: there, `tests/processes.py` sets what torchrun tells its processes."""
    (tmp_path / "meeting.py").write_text(MEETING)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, str(tmp_path / "meeting.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["0.5 0.0 True"] * 2


@pytest.mark.usefixtures("float64")
def test_two_processes_give_the_weights_of_one(
    configure: Callable[..., TrainConfig], without_dropout: dict[str, Any], tmp_path: Path
) -> None:
    data = {"batch_size": 8, "micro_batch_size": None}
    one = configure(model=without_dropout, data=data)
    two = configure(model=without_dropout, data=data, run=str(tmp_path / "two"))
    write_json(tmp_path / "recipe.json", to_dict(two))
    with ranks(2, tmp_path / "ranks", train_in_float64, tmp_path / "recipe.json") as processes:
        assert processes.wait() == [0, 0], processes.said()
    train(one, progress=False)
    found, expected = (load_file(Path(config.run) / "model" / "model.safetensors") for config in (two, one))
    torch.testing.assert_close(found, expected)
    assert "".join(processes.said()).count("step 8  100.0%") == 1


@pytest.mark.usefixtures("float64")
def test_two_processes_grow_and_freeze_as_one_does(
    configure: Callable[..., TrainConfig], without_dropout: dict[str, Any], tmp_path: Path
) -> None:
    changes = {
        "model": without_dropout,
        "data": {"batch_size": 8, "micro_batch_size": None},
        "grow": {"at": "10@50%", "opening": 0.2, "keys": "crowded", "freeze": ["rows", "keys", "rest"]},
        "checkpoint": {"every": 4},
    }
    one, two = configure(**changes), configure(**changes, run=str(tmp_path / "two"))
    write_json(tmp_path / "recipe.json", to_dict(two))
    with ranks(2, tmp_path / "ranks", train_in_float64, tmp_path / "recipe.json") as processes:
        assert processes.wait() == [0, 0], processes.said()
    train(one, progress=False)
    found, expected = (load_file(Path(config.run) / "model" / "model.safetensors") for config in (two, one))
    torch.testing.assert_close(found, expected)
    before = load_file(list_checkpoints(Path(two.run))[0] / "model.safetensors")
    rows, keys = "model.layers.1.ffw.experts.rows", "model.layers.1.ffw.product_keys.sub_keys"
    assert torch.equal(found[rows][:64], before[rows])
    assert torch.equal(found[keys][:, :, :8], before[keys])


def test_a_batch_that_cannot_be_shared_out_is_refused_once(
    configure: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    write_json(tmp_path / "recipe.json", to_dict(configure(data={"batch_size": 3})))
    with ranks(2, tmp_path / "ranks", train_in_float64, tmp_path / "recipe.json") as processes:
        assert processes.wait() == [2, 2], processes.said()
    said = "".join(processes.said())
    assert said.count("data.batch_size = 3 is not divisible by the 2 processes that train") == 1
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_alone_every_exchange_is_the_identity() -> None:
    with join_ranks("cpu") as ranks:
        assert ranks.is_main
        assert ranks.mean(torch.tensor(1.5)) == ranks.of_main(1.5) == 1.5
        assert ranks.any(True)
        assert not ranks.any(False)
        ranks.wait()
