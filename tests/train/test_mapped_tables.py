"""Runs with tables in files: the bits of runs in memory, whenever they are interrupted; what cannot be is refused."""

import json
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peerlm import UserError
from peerlm.evaluate.loading import load_model
from peerlm.layers.mapped.advice import read_rows_alone
from peerlm.layers.mapped.table import mapped_tables
from peerlm.model import PeerForCausalLM
from peerlm.ops.cpu import native
from peerlm.train import TrainConfig, loop, train
from peerlm.train.checkpoint import list_checkpoints
from peerlm.train.config import TablesConfig

Configure = Callable[..., TrainConfig]
Usage = namedtuple("Usage", "total used free")
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


def interrupt(config: TrainConfig, at: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, and be killed after each of these steps; each but the first time resume."""
    take_step, stops = loop.take_step, at[::-1]

    def interrupted(training: Any, state: Any, *arguments: Any) -> Any:
        found = take_step(training, state, *arguments)
        if stops and state.step + 1 == stops[-1]:
            stops.pop()
            raise InterruptedError
        return found

    monkeypatch.setattr(loop, "take_step", interrupted)
    for number in range(len(at)):
        with pytest.raises(InterruptedError):
            train(config, resume=number > 0, progress=False)


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_in_files_ends_as_one_in_memory_though_it_was_interrupted(
    kind: str, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = RUNS[kind]
    train(configure(run=str(tmp_path / "memory"), **changes), progress=False)
    config = in_files(configure, tmp_path / "rows", tmp_path / "files", **changes)
    interrupt(config, [1, 5, 8], monkeypatch)
    checkpoint = list_checkpoints(tmp_path / "files")[-1]
    assert not any("rows" in name or "exp_avg" in name for name in load_file(checkpoint / "model.safetensors"))
    with pytest.raises(ValueError, match="whose tables are in files elsewhere"):
        PeerForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(UserError, match="whose tables are in files elsewhere"):
        load_model(tmp_path / "files")
    with pytest.raises(UserError, match=r"has its tables in files in .*rows: resume with"):
        train(configure(run=str(tmp_path / "files"), **changes), resume=True, progress=False)
    train(config, resume=True, progress=False)
    found, wanted = weights(tmp_path / "files"), weights(tmp_path / "memory")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert log_of(tmp_path / "files") == log_of(tmp_path / "memory")
    logs = sorted(path.name for path in (tmp_path / "rows").rglob("undo-*"))
    assert len(set(logs)) <= config.checkpoint.keep
    shutil.rmtree(tmp_path / "rows")  # the model has the rows
    model, _ = load_model(tmp_path / "files")
    tables = [module for module in model.modules() if hasattr(module, "row_format")]
    assert tables
    assert all(native._is_of_a_file(table.rows.data_ptr()) for table in tables)


PEER_1024 = {"num_experts": 1024, "heads": 2, "experts_per_head": 2, "key_dim": 8}
PLACES = 256
"""As many as a step of two micro-batches has entries."""


@pytest.mark.parametrize("clip", [float("inf"), 0.01])
def test_a_run_with_places_on_a_device_ends_as_one_in_memory_though_it_was_interrupted(
    clip: float, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peerlm.train.tables.CACHING", ["cpu"])
    changes = {"optim": {"tables": "exact", "table_clip": clip}, "model": {"peer": PEER_1024}}
    on_device = {"device_rows": PLACES}

    def config(name: str) -> TrainConfig:
        tables = {"folder": str(tmp_path / f"{name}-rows"), **on_device}
        return configure(run=str(tmp_path / name), tables=tables, **changes)

    train(config("whole") if clip < 1 else configure(run=str(tmp_path / "whole"), **changes), progress=False)
    interrupt(config("killed"), [5], monkeypatch)
    train(config("killed"), resume=True, progress=False)
    found, wanted = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    rows, expected = log_of(tmp_path / "killed"), log_of(tmp_path / "whole")
    if clip > 1:  # summed in another order than in memory
        for row, other in zip(rows, expected, strict=True):
            assert row.pop("table_grad_norm", 0) == pytest.approx(other.pop("table_grad_norm", 0))
    assert rows == expected


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
    with pytest.raises(UserError, match=r"without tables\.folder: name a folder"):
        train(configure(tables={"cache": "1 GB"}), progress=False)
    with pytest.raises(UserError, match=r"tables.cache = 'much': must be a size like"):
        configure(tables={"folder": "rows", "cache": "much"})


def test_what_places_on_a_device_cannot_be_combined_with_is_refused(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(reason: str, rows: int, **changes: Any) -> None:
        tables = {"folder": str(tmp_path / "rows"), "device_rows": rows}
        with pytest.raises(UserError, match=reason):
            train(configure(tables=tables, **changes), progress=False)

    refused("device_rows = 9 on cpu, whose rows are where they are", 9)
    monkeypatch.setattr("peerlm.train.tables.CACHING", ["cpu"])
    refused(r"training on cpu without tables\.device_rows: say for how many rows", 0)
    refused("graph = 'on': the host fetches rows", 9, graph="on")
    refused(r"rows of a table are needed at once .* holds 9: take .* or more \(tables\.device_rows", 9)
    with pytest.raises(UserError, match=r"device_rows = 9 without tables\.folder: name a folder"):
        train(configure(tables={"device_rows": 9}, run=str(tmp_path / "other")), progress=False)
    with pytest.raises(UserError, match=r"tables.device_rows = -1: must be 0 or more"):
        configure(tables={"folder": "rows", "device_rows": -1})


def test_sizes_are_read_as_written() -> None:
    sizes = {"4 GB": 4 * 10**9, "1.5MiB": 3 * 2**19, "700 B": 700, "2 kB": 2000}
    assert {text: TablesConfig(cache=text).cache_bytes for text in sizes} == sizes
    assert TablesConfig().cache_bytes is None


def test_one_folder_is_of_one_run(configure: Configure, tmp_path: Path) -> None:
    train(in_files(configure, tmp_path / "rows", tmp_path / "first", budget={"steps": 1}), progress=False)
    with pytest.raises(UserError, match=r"has the tables of .*first: choose another folder"):
        train(in_files(configure, tmp_path / "rows", tmp_path / "second", budget={"steps": 1}), progress=False)
    assert mapped_tables(PeerForCausalLM.from_pretrained(tmp_path / "first/model")) == {}


def test_moments_without_room_on_the_disk_are_refused_before_the_first_step(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = 64 * 2 * 16 * 4
    free = iter([table] * 2 + [3 * table] * 9)  # for both tables, then for all that follows
    monkeypatch.setattr("peerlm.layers.mapped.place.shutil.disk_usage", lambda folder: Usage(0, 0, next(free)))
    with pytest.raises(UserError, match="free beside the tables that are there, and a file of"):
        train(in_files(configure, tmp_path / "rows", tmp_path / "run"), progress=False)
    assert not (tmp_path / "run/log.jsonl").exists()


def test_a_saved_table_larger_than_memory_is_read_by_rows_alone(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(configure(run=str(tmp_path / "run"), budget={"steps": 1}, model={"peer": PEER_4096}), progress=False)
    model, _ = load_model(tmp_path / "run")
    assert read_rows_alone(model) == []
    monkeypatch.setattr("peerlm.layers.mapped.advice.available_memory", lambda: 2.0**18)
    found = read_rows_alone(model)
    assert found == ["model.layers.1.ffw.experts"]
    rows = model.get_submodule(found[0]).rows
    assert "rr" in flags_of(rows.data_ptr() + rows.nbytes // 2)


PEER_4096 = {"num_experts": 4096, "heads": 2, "experts_per_head": 2, "key_dim": 8}


def flags_of(address: int) -> list[str]:
    """What the system knows of the mapping that has this address; "rr": it is read at random."""
    within = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            within = int(found[1], 16) <= address < int(found[2], 16)
        elif within and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []
