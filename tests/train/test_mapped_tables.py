"""Runs with tables in files: the bits of runs in memory, whenever they are interrupted; what cannot be is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peerlm import UserError
from peerlm.evaluate.loading import load_model
from peerlm.layers.mapped.table import mapped_tables
from peerlm.model import PeerForCausalLM
from peerlm.ops.cpu import native
from peerlm.train import TrainConfig, loop, train
from peerlm.train.checkpoint import list_checkpoints
from peerlm.train.config import TablesConfig

Configure = Callable[..., TrainConfig]
pytestmark = pytest.mark.whole_tables("has tables in files itself")


def in_files(configure: Configure, folder: Path, run: Path, **changes: Any) -> TrainConfig:
    return configure(run=str(run), tables={"folder": str(folder)}, **changes)


def weights(run: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted((run / "model").glob("*.safetensors")):
        found |= load_file(path)
    return found


def log_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if "second" not in key} for row in rows]


INT8 = {"model": {"peer": {"row_format": "int8", "num_experts": 64, "heads": 2, "experts_per_head": 2, "key_dim": 8}}}
RUNS: dict[str, dict[str, Any]] = {
    "exact": {"optim": {"tables": "exact", "weight_decay": 0.1}},
    "lazy": {"optim": {"tables": "lazy", "table_row_wise": True}},
    "int8": {
        "optim": {"table_beta1": 0.0, "table_row_wise": True, "table_clip": float("inf")},
        "data": {"micro_batch_size": None},
        **INT8,
    },
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_in_files_ends_as_one_in_memory_though_it_was_interrupted(
    kind: str, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = RUNS[kind]
    train(configure(run=str(tmp_path / "memory"), **changes), progress=False)
    config = in_files(configure, tmp_path / "rows", tmp_path / "files", **changes)
    take_step, steps = loop.take_step, iter([1, 5, 8])
    stop = next(steps)

    def interrupted(training: Any, state: Any, *arguments: Any) -> Any:
        found = take_step(training, state, *arguments)
        if state.step + 1 == stop:
            raise InterruptedError
        return found

    monkeypatch.setattr(loop, "take_step", interrupted)
    for number, stop in enumerate((1, 5, 8)):
        with pytest.raises(InterruptedError):
            train(config, resume=number > 0, progress=False)
    checkpoint = list_checkpoints(tmp_path / "files")[-1]
    assert not any("rows" in name or "exp_avg" in name for name in load_file(checkpoint / "model.safetensors"))
    with pytest.raises(ValueError, match="whose tables are in files elsewhere"):
        PeerForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(UserError, match="has its tables in files in .*rows: resume with"):
        train(configure(run=str(tmp_path / "files"), **changes), resume=True, progress=False)
    stop = -1
    train(config, resume=True, progress=False)
    found, wanted = weights(tmp_path / "files"), weights(tmp_path / "memory")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert log_of(tmp_path / "files") == log_of(tmp_path / "memory")
    logs = sorted(path.name for path in (tmp_path / "rows").rglob("undo-*"))
    assert len({name for name in logs}) <= config.checkpoint.keep
    shutil.rmtree(tmp_path / "rows")  # the model has the rows
    model, _ = load_model(tmp_path / "files")
    tables = [module for module in model.modules() if hasattr(module, "row_format")]
    assert tables
    assert all(native._is_of_a_file(table.rows.data_ptr()) for table in tables)


def test_what_tables_in_files_cannot_be_combined_with_is_refused(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(reason: str, **changes: Any) -> None:
        with pytest.raises(UserError, match=reason):
            train(in_files(configure, tmp_path / "rows", tmp_path / "run", **changes), progress=False)
        shutil.rmtree(tmp_path / "rows", ignore_errors=True)

    refused("cannot be combined with grow.at", grow={"at": "16@50%"}, model={"peer": {"num_experts": 64}})
    refused("checkpoint.background = true: set it to false", checkpoint={"background": True})
    refused("optim.tables = 'dense' cannot be combined with tables.folder", optim={"tables": "dense"})
    refused("compile = true: set it to false", compile=True)
    with pytest.raises(UserError, match="without tables.folder: name a folder"):
        train(configure(tables={"cache": "1 GB"}), progress=False)
    with pytest.raises(UserError, match=r"tables.cache = 'much': must be a size like"):
        configure(tables={"folder": "rows", "cache": "much"})


def test_sizes_are_read_as_written() -> None:
    sizes = {"4 GB": 4 * 10**9, "1.5MiB": 3 * 2**19, "700 B": 700, "2 kB": 2000}
    assert {text: TablesConfig(cache=text).cache_bytes for text in sizes} == sizes
    assert TablesConfig().cache_bytes is None


def test_one_folder_is_of_one_run(configure: Configure, tmp_path: Path) -> None:
    train(in_files(configure, tmp_path / "rows", tmp_path / "first", budget={"steps": 1}), progress=False)
    with pytest.raises(UserError, match="has the tables of .*first: choose another folder"):
        train(in_files(configure, tmp_path / "rows", tmp_path / "second", budget={"steps": 1}), progress=False)
    assert mapped_tables(PeerForCausalLM.from_pretrained(tmp_path / "first/model")) == {}
