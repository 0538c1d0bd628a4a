"""Whole runs: what they write, what they refuse, and how they end early."""

import json
import math
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import peerlm.optim.saved
import peerlm.train.build
import peerlm.train.loop
import peerlm.train.run_folder
import peerlm.train.watching
from peerlm.accounting import model_cost
from peerlm.data import TokenShards, TokenWindows
from peerlm.data.request import difference
from peerlm.errors import UserError
from peerlm.evaluate import held_out_loss
from peerlm.files import PARTIAL
from peerlm.optim import RowAdamW
from peerlm.train import TrainConfig, TrainingStopped, load_recipe, train
from peerlm.train.build import build_optimizer
from peerlm.train.checkpoint import list_checkpoints
from peerlm.train.loop import take_step
from peerlm.train.run_folder import check_run

Configure = Callable[..., TrainConfig]
TIMES = {"seconds", "tokens_per_second"}


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def untimed(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows(run)]


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


@pytest.fixture
def straight(configure: Configure, tmp_path: Path) -> Path:
    """The run that nothing interrupts."""
    return train(configure(run=str(tmp_path / "straight")), progress=False).run


def test_a_run_leaves_all_that_it_promises(configure: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    config = configure()
    result = train(config, progress=False)
    assert capsys.readouterr() == ("", "")
    run = Path(config.run)
    assert {path.name for path in run.iterdir()} == {
        "checkpoints",
        "config.json",
        "log.jsonl",
        "model",
        "summary.json",
    }
    assert load_recipe(run / "config.json") == config
    assert json.loads((run / "summary.json").read_text()) == result.summary
    assert [folder.name for folder in list_checkpoints(run)] == ["step-00000006", "step-00000008"]
    assert [(row["step"], "loss" in row, "validation_loss" in row) for row in rows(run)] == [
        (2, True, False),
        (4, True, False),
        (4, False, True),
        (6, True, False),
        (8, True, False),
        (8, False, True),
    ]


@pytest.mark.usefixtures("float64")
def test_the_summary_agrees_with_the_model_it_describes(configure: Configure) -> None:
    config = configure()
    summary = train(config, progress=False).summary
    model = AutoModelForCausalLM.from_pretrained(Path(config.run) / "model")
    heldout = TokenWindows(TokenShards(config.data.folder, "heldout"), 16)
    loss = held_out_loss(model, heldout, batch_size=3, limit=4)
    cost = model_cost(model, 16)
    assert summary["validation_loss"] == pytest.approx(loss)
    assert summary["perplexity"] == pytest.approx(math.exp(loss))
    assert (summary["steps"], summary["tokens"]) == (8, 8 * 4 * 16)
    assert summary["flops"] == 8 * 4 * 16 * cost.training_flops_per_token
    assert summary["total_parameters"] == cost.total_parameters
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / summary["seconds"])
    assert summary["peak_memory_bytes"] > 2**20
    assert summary["cpu_seconds"] > 0
    (usage,) = summary["usage"].values()
    assert 0 < usage["share"] <= 1
    assert 0 <= usage["unevenness"] <= math.log(64)
    tokenizer = AutoTokenizer.from_pretrained(Path(config.run) / "model")
    assert tokenizer.decode(tokenizer("the cat sat")["input_ids"]) == "the cat sat"


def test_a_model_learns(configure: Configure) -> None:
    config = configure(budget={"steps": 80}, optim={"learning_rate": 1e-2}, log={"every": 10}, eval={"every": 0})
    train(config, progress=False)
    losses = [row["loss"] for row in rows(Path(config.run)) if "loss" in row]
    assert losses[-1] < losses[0] - 1.0


def test_rows_hold_the_scheduled_learning_rate_and_mean_losses(configure: Configure, tmp_path: Path) -> None:
    optim = {"schedule": "wsd", "warmup": 0.5, "decay": 0.5, "final": 0.0, "learning_rate": 0.01}
    each = configure(optim=optim, log={"every": 1}, eval={"every": 0})
    pairs = configure(optim=optim, log={"every": 2}, eval={"every": 0}, run=str(tmp_path / "pairs"))
    single, double = ([row for row in rows(train(c, progress=False).run) if "loss" in row] for c in (each, pairs))
    expected = [0.0025, 0.005, 0.0075, 0.01, 0.0075, 0.005, 0.0025, 0.0]
    assert [row["lr"] for row in single] == pytest.approx(expected)
    means = [(a["loss"] + b["loss"]) / 2 for a, b in zip(single[::2], single[1::2], strict=True)]
    assert [row["loss"] for row in double] == pytest.approx(means)


@pytest.mark.parametrize(("budget", "steps"), [({"tokens": 200}, 3), ({"flops": 1.5e7}, None)])
def test_a_budget_is_spent_but_not_exceeded(configure: Configure, budget: dict[str, float], steps: int | None) -> None:
    summary = train(configure(budget=budget), progress=False).summary
    per_step = 64 * summary["training_flops_per_token"]
    assert summary["steps"] == (steps or 1.5e7 // per_step) > 0


def test_minutes_are_minutes_of_training(configure: Configure) -> None:
    config = configure(budget={"minutes": 1 / 60}, eval={"every": 0}, checkpoint={"every": 0})
    summary = train(config, progress=False).summary
    assert 1.0 <= summary["seconds"] < 3.0
    assert rows(Path(config.run))[-2]["lr"] < 0.2 * config.optim.learning_rate


def test_weights_do_not_depend_on_what_is_watched(configure: Configure, tmp_path: Path) -> None:
    whole = {"tables": "dense"}  # rows that catch up at another time are rounded at another time
    straight = train(configure(run=str(tmp_path / "straight"), optim=whole), progress=False).run
    config = configure(
        eval={"every": 1},
        checkpoint={"every": 1},
        log={"every": 1, "tensorboard": True},
        data={"workers": 1},
        optim=whole,
    )
    assert weights(train(config, progress=False).run) == weights(straight)
    assert list((Path(config.run) / "tensorboard").iterdir())


def test_another_seed_gives_other_weights(configure: Configure, straight: Path) -> None:
    assert weights(train(configure(seed=1), progress=False).run) != weights(straight)


@pytest.mark.usefixtures("float64")
def test_accumulation_changes_no_more_than_rounding(configure: Configure, tmp_path: Path) -> None:
    model = {
        "attention_dropout": 0.0,
        "peer": {"num_experts": 64, "key_dim": 8, "experts_per_head": 2, "query_norm": "layer"},
    }
    runs = [
        train(
            configure(run=str(tmp_path / str(size)), model=model, data={"micro_batch_size": size}),
            progress=False,
        ).run
        for size in (1, 3, None)
    ]
    first, *others = [AutoModelForCausalLM.from_pretrained(run / "model").state_dict() for run in runs]
    for other in others:
        torch.testing.assert_close(other, first)


def test_bfloat16_trains_about_as_well(configure: Configure, straight: Path) -> None:
    found = train(configure(precision="bf16"), progress=False).summary["train_loss"]
    expected = json.loads((straight / "summary.json").read_text())["train_loss"]
    assert found == pytest.approx(expected, rel=2 * torch.finfo(torch.bfloat16).eps)


@pytest.fixture
def weights_in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("weights_in_float64")
def test_gradient_checkpointing_trains_the_same(configure: Configure, straight: Path) -> None:
    found = train(configure(gradient_checkpointing=True), progress=False).summary["train_loss"]
    expected = json.loads((straight / "summary.json").read_text())["train_loss"]
    assert found == pytest.approx(expected)


def test_the_compiled_model_is_what_steps_call(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = train(configure(run=str(tmp_path / "straight"), optim={"tables": "dense"}), progress=False).run
    compiled = []

    def compile_(model: torch.nn.Module) -> Callable[..., Any]:
        compiled.append(model)
        return model

    monkeypatch.setattr(torch, "compile", compile_)
    assert weights(train(configure(compile=True), progress=False).run) == weights(straight)
    assert len(compiled) == 1


def test_named_sources_are_prepared(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(f"{i} green birds" * 20 for i in range(50)))
    data = {
        "folder": str(tmp_path / "tokens"),
        "sources": [str(tmp_path / "text.txt")],
        "vocab_size": 280,
        "holdout": 0.2,
    }
    config = configure(data=data)
    train(config, progress=False)
    assert TokenShards(tmp_path / "tokens", "train").vocab_size == 280


def test_a_prepared_folder_is_used_whatever_sources_the_recipe_names(
    configure: Configure, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = configure(data={"folder": str(data), "sources": ["demo"], "vocab_size": 4096, "holdout": 0.1})
    result = train(config, progress=False)
    [said] = caplog.messages
    assert said.startswith(f"{data} is prepared already and used as it is, so that some settings of the recipe have no")
    assert said.endswith("corpus.txt, not demo; vocab_size = 300, not 4096.")
    assert "of `corpus.txt`, in windows" in (result.run / "model" / "README.md").read_text()
    assert TokenShards(data, "train").vocab_size < 4096


@pytest.mark.parametrize("change", ["gone", "changed", "copied"])
def test_a_prepared_folder_is_used_though_its_sources_are_others_now(
    change: str, configure: Configure, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "text.txt"
    source.write_text("\n<|endoftext|>\n".join(f"{i} green birds" * 20 for i in range(50)))
    folder = str(tmp_path / "tokens")
    settings = {"folder": folder, "sources": [str(source)], "vocab_size": 280, "holdout": 0.2}
    train(configure(data=settings, budget={"steps": 1}), progress=False)
    assert not caplog.messages
    if change == "gone":
        source.unlink()
    elif change == "changed":
        source.write_text("other text")
    else:
        os.utime(source, (1.0, 1.0))
    train(configure(data=settings, budget={"steps": 1}, run=str(tmp_path / "again")), progress=False)
    [said] = caplog.messages
    ending = {
        "gone": f"and those of the recipe cannot be read ({source} does not exist",
        "changed": f"of which {source} has changed since.",
        "copied": f"of which {source} is dated otherwise now, as large as before.",
    }[change]
    assert f"was prepared with sources = {source}, {ending}" in said


@pytest.mark.parametrize("first_changed", [True, False])
def test_of_several_sources_one_that_changed_is_named(first_changed: bool) -> None:
    before = [{"path": name, "bytes": 3, "mtime_ns": 1} for name in ("/a", "/b")]
    now = [{**source, "mtime_ns": 2} for source in before]
    now[not first_changed]["bytes"] = 9
    name = "/a" if first_changed else "/b"
    assert difference("sources", before, now) == f"sources = /a and 1 more, of which {name} has changed since"


def test_a_split_of_an_older_version_is_said(
    configure: Configure, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = Path(shutil.copytree(data, tmp_path / "old"))
    fields = json.loads((old / "manifest.json").read_text())
    del fields["copies"], fields["files"]
    (old / "manifest.json").write_text(json.dumps(fields))
    train(configure(data={"folder": str(old)}, budget={"steps": 1}), progress=False)
    [said] = caplog.messages
    assert "was prepared by an older version: held-out documents may have copies in the training text" in said


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"hiden_size": 8}, "unknown key 'model.hiden_size': did you mean 'model.hidden_size'?"),
        ({"num_attention_heads": 3}, "no model can be built from the recipe's [model]: head_dim is 5"),
        ({"hidden_size": "wide"}, "no model can be built from the recipe's [model]: "),
        ({"peer": {"num_experts": 65}}, "no model can be built from the recipe's [model]: num_experts"),
        (
            {"peer": {"head": 2}},
            "no model can be built from the recipe's [model]: peer has no setting 'head'",
        ),
        ({"vocab_size": 50}, "model.vocab_size = 50 is less than the data's"),
        ({"max_position_embeddings": 8}, "data.context = 16 is more than model.max_position_embeddings = 8"),
    ],
)
def test_a_model_that_cannot_be_built_is_explained_and_leaves_no_run(
    configure: Configure, model: dict[str, Any], message: str
) -> None:
    config = configure(model=model)
    with pytest.raises(UserError) as error:
        train(config, progress=False)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path(config.run).exists()


def test_cuda_is_refused_where_there_is_none(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device = 'cuda': PyTorch finds no CUDA device"):
        train(configure(device="cuda"), progress=False)


def test_nothing_is_overwritten(configure: Configure, straight: Path) -> None:
    before = {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"straight already exists: resume it with `peerlm train .*straight --resume`"):
        train(configure(run=str(straight)), progress=False)
    assert {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()} == before


def test_a_file_in_the_place_of_the_run_is_refused(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file exists and is not a run: choose another folder with --output"):
        train(configure(run=str(tmp_path / "file")), progress=False)


def test_an_empty_folder_is_a_place_for_a_run(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert train(configure(run=str(tmp_path / "empty")), progress=False).summary["steps"] == 8


def test_a_folder_that_is_no_run_is_not_offered_for_resuming(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(UserError, match="notes exists and is not a run: choose another folder with --output"):
        train(configure(run=str(tmp_path / "notes")), progress=False)


def test_only_a_run_can_be_resumed(configure: Configure, tmp_path: Path) -> None:
    config = configure()
    with pytest.raises(UserError, match=r"there is no run .*run to resume: leave out --resume to start it"):
        train(config, resume=True, progress=False)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").touch()
    with pytest.raises(UserError, match=r"is not a run, for it has no config.json"):
        train(config, resume=True, progress=False)


def test_auto_starts_where_there_is_no_run_and_resumes_one(
    configure: Configure, straight: Path, tmp_path: Path
) -> None:
    check_run(configure(), resume="auto")
    (tmp_path / "run").mkdir()
    check_run(configure(), resume="auto")
    check_run(configure(run=str(straight)), resume="auto")
    with pytest.raises(UserError, match="seed was 0, now 1"):
        check_run(configure(run=str(straight), seed=1), resume="auto")
    (tmp_path / "run" / "thesis.txt").touch()
    with pytest.raises(UserError, match=r"is not a run, for it has no config.json"):
        check_run(configure(), resume="auto")


def test_a_run_is_not_resumed_as_another(configure: Configure, straight: Path) -> None:
    with pytest.raises(
        UserError, match=r"cannot resume .*straight, for optim.learning_rate was 0.003, now 0.1: resume with"
    ):
        train(configure(run=str(straight), optim={"learning_rate": 0.1}), resume=True, progress=False)


@pytest.mark.parametrize("left", ["nothing", "an empty folder of checkpoints"])
def test_a_run_whose_folder_was_just_being_made_starts(
    left: str, configure: Configure, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure()
    with monkeypatch.context() as patch:
        patch.setattr(peerlm.train.run_folder, "write_json", Mock(side_effect=OSError(122, "Disk quota exceeded")))
        with pytest.raises(UserError, match="is full: free some space, then --resume"):
            train(config, progress=False)
    assert list(Path(config.run).iterdir()) == []
    if left != "nothing":
        (Path(config.run) / "checkpoints").mkdir()
    train(config, resume=True, progress=False)
    assert weights(Path(config.run)) == weights(straight)


def test_a_loss_beyond_what_has_a_perplexity_is_written_down(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A run with too high a rate ends with its figures, so that a study goes on."""
    monkeypatch.setattr(peerlm.train.watching, "held_out_loss", lambda *arguments, **options: 1000.0)
    summary = train(configure(budget={"steps": 2}), progress=False).summary
    assert (summary["validation_loss"], summary["perplexity"]) == (1000.0, math.inf)


def test_resuming_a_finished_run_returns_its_summary(configure: Configure, straight: Path) -> None:
    before = (straight / "log.jsonl").read_bytes()
    result = train(configure(run=str(straight)), resume=True, progress=False)
    assert result.summary == json.loads((straight / "summary.json").read_text())
    assert (straight / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_run_goes_on_as_if_it_had_not_come(
    configure: Configure, straight: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    config = configure()

    def signalled(training: Any, state: Any, *arguments: Any) -> Any:
        if state.step == 4:
            signal.raise_signal(number)
        return take_step(training, state, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(peerlm.train.loop, "take_step", signalled)
        with pytest.raises(TrainingStopped) as stopped:
            train(config, progress=False)
    assert stopped.value.exit_code == code
    newest = list_checkpoints(Path(config.run))[-1]
    assert newest.name == "step-00000005"
    assert str(stopped.value) == f"stopped by {number.name} after step 5; the last good checkpoint is {newest}"
    train(config, resume=True, progress=False)
    assert weights(Path(config.run)) == weights(straight)
    assert untimed(Path(config.run)) == untimed(straight)


@pytest.mark.parametrize("first_by_rows", [True, False])
def test_a_run_goes_on_where_auto_chooses_another_optimizer(
    first_by_rows: bool, configure: Configure, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As over another number of processes: one process updates tables by rows, several that hold copies do not."""
    config = configure()
    kinds = []

    def build(*arguments: Any) -> Any:
        kinds.append(optimizer := build_optimizer(*arguments))
        return optimizer

    def signalled(training: Any, state: Any, *arguments: Any) -> Any:
        if state.step == 4:
            signal.raise_signal(signal.SIGTERM)
        return take_step(training, state, *arguments)

    monkeypatch.setattr(peerlm.train.build, "build_optimizer", build)
    with monkeypatch.context() as patch:
        patch.setattr(peerlm.train.loop, "take_step", signalled)
        patch.setattr(peerlm.train.build, "_rows_pay", lambda *arguments: first_by_rows)
        with pytest.raises(TrainingStopped):
            train(config, progress=False)
    monkeypatch.setattr(peerlm.train.build, "_rows_pay", lambda *arguments: not first_by_rows)
    train(config, resume=True, progress=False)
    assert [isinstance(kind, RowAdamW) for kind in kinds] == [first_by_rows, not first_by_rows]
    found, expected = (load_file(run / "model/model.safetensors") for run in (Path(config.run), straight))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


def test_a_loss_that_is_not_finite_stops_before_it_does_harm(configure: Configure) -> None:
    config = configure(optim={"learning_rate": 1e30, "warmup": 0.0, "final": 1.0}, checkpoint={"every": 1})
    with pytest.raises(TrainingStopped) as stopped:
        train(config, progress=False)
    assert stopped.value.exit_code == 3
    (checkpoint,) = list_checkpoints(Path(config.run))
    assert checkpoint.name == "step-00000001"
    assert re.fullmatch(
        r"training stopped at step 2: the (loss|gradient norm) is (nan|inf) at learning rate 1e\+30; the last good "
        rf"checkpoint is {re.escape(str(checkpoint))}; start another run with a lower optim\.learning_rate",
        str(stopped.value),
    )


def test_a_gradient_that_is_not_finite_stops_too(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulate = peerlm.train.loop.accumulate_gradients

    def poison(model: torch.nn.Module, *arguments: Any, **settings: Any) -> torch.Tensor:
        loss = accumulate(model, *arguments, **settings)
        model.get_parameter("model.norm.weight").grad.fill_(math.inf)
        return loss

    monkeypatch.setattr(peerlm.train.loop, "accumulate_gradients", poison)
    config = configure()
    with pytest.raises(
        TrainingStopped, match=r"step 1: the gradient norm is inf .* has no checkpoint yet; start another"
    ):
        train(config, progress=False)
    assert list_checkpoints(Path(config.run)) == []


def test_a_full_disk_loses_nothing(configure: Configure, straight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure()
    save = peerlm.optim.saved.save_file

    def fill_up(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        save(tensors, path, metadata)
        if list_checkpoints(Path(config.run)):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(peerlm.optim.saved, "save_file", fill_up)
        with pytest.raises(UserError) as error:
            train(config, progress=False)
    (checkpoint,) = list_checkpoints(Path(config.run))
    assert str(error.value) == (
        f"the disk of {config.run} is full: free some space, then --resume; the last good checkpoint is {checkpoint}"
    )
    assert not list(Path(config.run).rglob(PARTIAL + "*"))
    assert rows(Path(config.run))[-1]["step"] == 6
    train(config, resume=True, progress=False)
    assert weights(Path(config.run)) == weights(straight)
    assert untimed(Path(config.run)) == untimed(straight)


def test_a_damaged_checkpoint_is_stepped_over_by_hand(configure: Configure, straight: Path) -> None:
    config = configure(run=str(straight))
    (straight / "summary.json").unlink()
    expected = weights(straight)
    newest = list_checkpoints(straight)[-1]
    (newest / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"step-00000008 is damaged .* the run then resumes from step-00000006"):
        train(config, resume=True, progress=False)
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    train(config, resume=True, progress=False)
    assert weights(straight) == expected


def test_progress_is_told_in_lines(configure: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    train(configure(), progress=True)
    shown = capsys.readouterr().err
    assert "step 2  25.0%  loss " in shown
    assert "step 8  validation loss " in shown
    assert "Writing" not in shown


def test_measuring_copies_changes_nothing_else(configure: Callable[..., TrainConfig], tmp_path: Path) -> None:
    short: dict[str, Any] = {"budget": {"steps": 2}, "eval": {"every": 1}}
    plain = train(configure(run=str(tmp_path / "plain"), **short), progress=False)
    short["eval"] |= {"copying": True}
    asked = train(configure(run=str(tmp_path / "asked"), **short), progress=False)
    assert asked.summary["validation_loss"] == plain.summary["validation_loss"]
    assert asked.summary["usage"] == plain.summary["usage"]
    measured = [row["copying"] for row in rows(asked.run) if "validation_loss" in row]
    assert measured[-1] == asked.summary["copying"]
    assert len(measured) == 2
    for figures in measured:
        assert figures["first_half"] > 0 < figures["second_half"]
        assert list(figures["first_token"]) == ["0", "1"]
        assert list(figures["by_position"]) == ["1", "2-3", "4-7", "8-15"]
    assert "copying" not in plain.summary


def test_copies_need_windows_of_four_tokens(configure: Callable[..., TrainConfig]) -> None:
    with pytest.raises(UserError, match="copying is measured on windows of at least 4 tokens, not of 3"):
        train(configure(data={"context": 3}, eval={"copying": True}), progress=False)
