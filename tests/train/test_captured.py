"""Steps that are replays of a graph: a stand-in on the CPU replays what was recorded, and nothing else."""

import json
import logging
import math
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from peerlm.data import Batch
from peerlm.ops.operators import PEERLM
from peerlm.train import TrainConfig, TrainingStopped, captured, loop, train
from peerlm.train.captured import Steps
from peerlm.train.checkpoint import list_checkpoints
from peerlm.train.feed import Feed
from peerlm.train.measures import Measures, Unusable

from ..host_reads import NoHostReads
from . import table_kernels
from .recorded_graph import RecordedGraph

Configure = Callable[..., TrainConfig]
CPU = torch.device("cpu")
MODEL = {"peer": {"num_experts": 16, "heads": 1, "experts_per_head": 2, "key_dim": 4, "dropout": 0.1}}
SHORT = {"context": 8}
WHOLE = {"context": 8, "micro_batch_size": 4}
BY_ROWS = {"tables": "exact"}
EAGER_STEPS = 2
STEPS = 2 * (EAGER_STEPS + 1) + 3


@pytest.fixture
def configure(configure: Configure) -> Configure:
    """Runs of this file are on the CPU, also where there is a GPU."""
    return partial(configure, device="cpu")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[RecordedGraph]:
    """The CPU is a device that is not waited for, and has graphs: those that are made."""
    monkeypatch.setitem(captured.GRAPHS, "cpu", RecordedGraph)
    monkeypatch.setattr(captured, "EAGER_STEPS", EAGER_STEPS)
    monkeypatch.setattr(RecordedGraph, "made", [])
    monkeypatch.setattr("peerlm.optim.groups.read_at_once", lambda device: False)
    monkeypatch.setattr("peerlm.optim.row_adamw._kernels", lambda table: table_kernels)
    monkeypatch.setattr("peerlm.optim.sparse_gradients.api.sum_by_row", table_kernels.sum_by_row)
    monkeypatch.setattr(PEERLM, "_padded_gradients", {"cpu": table_kernels.padded_gradients})
    for module in ("placed", "row_adamw"):
        monkeypatch.setattr(f"peerlm.optim.{module}.capturing", lambda device: RecordedGraph.capturing)
    return RecordedGraph.made


def rows_of(run: str) -> list[dict[str, Any]]:
    """What the log says, without times."""
    rows = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if "second" not in name} for row in rows]


def outcome(run: str) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    return load_file(Path(run) / "model" / "model.safetensors"), rows_of(run)


def assert_same(found: str, expected: str) -> None:
    (weights, rows), (other_weights, other_rows) = outcome(found), outcome(expected)
    assert rows == other_rows
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


@pytest.mark.parametrize("optim", [BY_ROWS, {"tables": "dense"}], ids=str)
def test_replayed_steps_have_the_bits_of_eager_ones(
    optim: dict[str, Any], configure: Configure, tmp_path: Path, graphs: list[RecordedGraph]
) -> None:
    for graph in ("off", "auto"):
        settings = {"run": str(tmp_path / graph), "graph": graph, "budget": {"steps": STEPS}}
        train(configure(**settings, model=MODEL, data=SHORT, optim={**optim, "clip": 0.5}), progress=False)
    plain, watched = graphs  # in every other step the use of experts is measured
    assert (plain.replays, watched.replays) == (STEPS - STEPS // 2 - EAGER_STEPS, STEPS // 2 - EAGER_STEPS)
    assert watched.earlier is plain
    assert_same(str(tmp_path / "auto"), str(tmp_path / "off"))


def test_a_run_of_replays_resumes_to_the_same_bits(
    configure: Configure, tmp_path: Path, graphs: list[RecordedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"model": MODEL, "data": WHOLE, "optim": BY_ROWS, "budget": {"steps": 6}, "log": {"every": 3}}
    train(configure(run=str(tmp_path / "straight"), **settings), progress=False)
    take_step = loop.take_step

    def signalled(training: Any, state: Any, *arguments: Any) -> Any:
        if state.step == 4:
            signal.raise_signal(signal.SIGTERM)
        return take_step(training, state, *arguments)

    config = configure(run=str(tmp_path / "stopped"), **settings)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", signalled)
        with pytest.raises(TrainingStopped, match="SIGTERM"):
            train(config, progress=False)
    train(config, resume=True, progress=False)
    assert_same(config.run, str(tmp_path / "straight"))


@pytest.mark.usefixtures("graphs")
def test_seconds_are_those_of_the_device_not_of_what_was_sent_ahead(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that takes a second for the steps between two reads, and a host that sends one in 0.1 s."""
    clock, read = [0.0], Measures.read

    def passed(seconds: float) -> float:
        clock[0] += seconds
        return clock[0]

    def slowly(measures: Measures) -> tuple[float, Unusable | None]:
        passed(1.0)
        return read(measures)

    monkeypatch.setattr(Measures, "read", slowly)
    host = SimpleNamespace(perf_counter=lambda: passed(0.05), process_time=time.process_time)
    monkeypatch.setattr(loop, "time", host)
    settings = {"model": MODEL, "data": SHORT, "optim": BY_ROWS, "log": {"every": 1}, "checkpoint": {"every": 0}}
    summary = train(configure(**settings, budget={"minutes": 2.5 / 60}), progress=False).summary
    assert summary["steps"] == 3
    assert summary["seconds"] >= 3
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / summary["seconds"])


def test_layers_grow_between_replays(configure: Configure, tmp_path: Path, graphs: list[RecordedGraph]) -> None:
    growing = {"at": "5@50%", "opening": 0.1}
    for graph in ("off", "auto"):
        settings = {"run": str(tmp_path / graph), "graph": graph, "budget": {"steps": 12}, "log": {"every": 40}}
        optim = {"tables": "dense"}
        train(configure(**settings, model=MODEL, data=WHOLE, optim=optim, grow=growing), progress=False)
    assert [made.replays for made in graphs] == [6 - EAGER_STEPS, 5 - EAGER_STEPS]  # in one step they open
    assert_same(str(tmp_path / "auto"), str(tmp_path / "off"))


def poisoned(at: int) -> Callable[..., Tensor]:
    """The loss of one step is NaN, and so are its gradients."""
    accumulate, calls = loop.accumulate_gradients, iter(range(1, 1000))

    def poison(model: torch.nn.Module, *arguments: Any, **options: Any) -> Tensor:
        loss = accumulate(model, *arguments, **options)
        if next(calls) == at:
            loss = loss * math.nan
            for parameter in model.parameters():
                parameter.grad.fill_(math.nan)
        return loss

    return poison


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize(("every", "checkpoint", "kept"), [(4, 100, []), (100, 2, ["step-00000002"])])
def test_what_is_not_finite_is_named_late_and_never_saved(
    every: int, checkpoint: int, kept: list[str], configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "accumulate_gradients", poisoned(at=3))
    optim = {"tables": "dense", "learning_rate": 1e-3, "schedule": "wsd", "warmup": 0.0}
    config = configure(
        graph="off", model=MODEL, optim=optim, log={"every": every}, checkpoint={"every": checkpoint}, eval={"every": 0}
    )
    with pytest.raises(TrainingStopped, match=r"stopped at step 3: the loss is nan at learning rate 0.001") as stopped:
        train(config, progress=False)
    assert stopped.value.exit_code == 3
    assert [folder.name for folder in list_checkpoints(Path(config.run))] == kept


def test_a_step_that_waits_is_made_eagerly_and_that_is_said(
    graphs: list[RecordedGraph], caplog: pytest.LogCaptureFixture
) -> None:
    steps, total = Steps(CPU, torch.optim.SGD([torch.zeros(1)])), torch.zeros((), dtype=torch.int64)

    def work(ids: Tensor) -> int:
        total.add_(ids.sum())
        return int(total)

    found = [steps.make("kind", torch.full((2, 2), number), work) for number in range(6)]
    assert found == [0, 4, 12, 24, 40, 60]
    assert len(graphs) == 1
    assert len(caplog.records) == 1
    assert "steps are not captured in graphs, and so are slower: a graph cannot wait" in caplog.text


@pytest.mark.usefixtures("graphs")
def test_steps_of_another_shape_or_kind_are_captured_apart() -> None:
    steps, total = Steps(CPU, torch.optim.SGD([torch.zeros(1)])), torch.zeros((), dtype=torch.int64)

    def work(ids: Tensor) -> Tensor:
        return total.add_(ids.sum())

    expected = 0
    for number in range(12):
        kind, rows = "ab"[number % 2], 1 + number % 3
        expected += 2 * rows * number
        steps.make(kind if number else None, torch.full((rows, 2), number), work)
        assert total == expected


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"graph": "on"}, "slower: the run is on device cpu, and a graph is one of CUDA's"),
    ],
)
def test_a_graph_that_is_asked_for_in_vain_is_explained(
    changes: dict[str, Any], said: str | None, configure: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        train(configure(**changes, budget={"steps": 1}), progress=False)
    assert (said in caplog.text) if said else not caplog.records


@pytest.mark.usefixtures("graphs")
def test_a_compiled_model_is_not_captured(configure: Configure, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda model: model)
        train(configure(compile=True, budget={"steps": 1}), progress=False)
    assert "slower: compile = true" in caplog.text


def test_measures_name_the_first_step_that_is_not_finite() -> None:
    measures = Measures(CPU)
    measures.begin(1.5)
    for step, numbers in enumerate([(1.0, 2.0), (2.0, math.inf), (math.nan, 0.0), (4.0, 5.0)], start=11):
        measures.count_step(step, step / 10)
        with NoHostReads():
            measures.add({"loss": torch.tensor(numbers[0]), "norm": torch.tensor(numbers[1])})
    loss_sum, unusable = measures.read()
    assert math.isnan(loss_sum)
    assert unusable == Unusable(step=12, learning_rate=1.2, name="norm", value=math.inf)
    assert measures.newest == {"loss": 4.0, "norm": 5.0}
    measures.begin()
    measures.count_step(15, 1.5)
    measures.add({"loss": torch.tensor(0.25), "norm": torch.tensor(1.0)})
    assert measures.read() == (0.25, None)


class Courier:
    """Notes what happens."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def send(self, batch: Batch) -> Batch:
        self.events.append(f"send {batch['input_ids'].item()}")
        return Batch(input_ids=batch["input_ids"] + 100)

    def receive(self, batch: Batch) -> Batch:
        self.events.append(f"receive {batch['input_ids'].item()}")
        return batch


def test_one_batch_is_sent_ahead() -> None:
    events: list[str] = []
    feed = Feed((Batch(input_ids=torch.tensor(number)) for number in range(9)), Courier(events))
    found = [next(feed)["input_ids"].item()]
    for _ in range(2):
        feed.read_ahead()
        feed.read_ahead()
        events.append("step")
        found.append(next(feed)["input_ids"].item())
    assert found == [100, 101, 102]
    assert events == ["send 0", "receive 100", "send 1", "step", "receive 101", "send 2", "step", "receive 102"]


def test_a_cpu_needs_no_courier() -> None:
    batches = [Batch(input_ids=torch.tensor(number)) for number in range(3)]
    feed = Feed.to(CPU, iter(batches))
    feed.read_ahead()
    assert list(feed) == batches
