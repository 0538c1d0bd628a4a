"""A stream stopped at any moment resumes to the bits of one never stopped; its matrix, its memory, its errors."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peerlm.continual import LearnConfig, learn, markdown_matrix, stream
from peerlm.continual.methods import METHODS
from peerlm.data import Manifest
from peerlm.errors import TrainingStopped, UserError
from peerlm.evaluate import held_out_loss, load_model
from peerlm.files import PARTIAL
from peerlm.optim import clip_gradients
from peerlm.testing import assert_within_budget, definition, float64
from peerlm.train import loop

SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2},
    "grow": {"sub_keys": 2},
    "pack": {"experts": 16},
    "sparse": {"experts": 8},
}


class Killed(BaseException):
    """What no code catches, as when the process ends."""


def tensors(run: str) -> dict[str, bytes]:
    """Weights that a stream left, by file."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in Path(run).rglob("*.safetensors")
        if "background" not in path.name
    }


def kill_at(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let the step with this number, counted over all stages, die before its update."""
    steps = iter(range(1, 1000))

    def clip(*args: Any, **options: Any) -> Any:
        if next(steps) == count:
            raise Killed
        return clip_gradients(*args, **options)

    monkeypatch.setattr(loop, "clip_gradients", clip)


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_stream_ends_as_if_it_had_not_been(
    method: str, configure: Callable[..., LearnConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"method": method, "settings": SETTINGS.get(method, {}), "optim": {"schedule": "wsd"}}
    straight = configure(**options)
    rows = learn(straight, progress=False)
    killed = replace(straight, run=straight.run + "-killed", checkpoint_every=2)
    for count in (4, 4):  # in the first stage after its checkpoint, then in the second
        kill_at(monkeypatch, count)
        with pytest.raises(Killed):
            learn(killed, resume="auto", progress=False)
    monkeypatch.undo()
    resumed = learn(killed, resume=True, progress=False)
    assert [row["loss"] for row in resumed] == [row["loss"] for row in rows]
    assert tensors(killed.run) == tensors(straight.run)
    assert not list(Path(killed.run).rglob(PARTIAL + "*"))
    assert not list(Path(killed.run).rglob("checkpoints"))
    logs = [Path(run) / "stages/1-code/log.jsonl" for run in (straight.run, killed.run)]
    losses = [[json.loads(line)["loss"] for line in log.read_text().splitlines()] for log in logs]
    assert losses[0] == losses[1]


def test_told_to_stop_it_saves_and_says_so(
    configure: Callable[..., LearnConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure()

    def clip(*args: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return clip_gradients(*args, **options)

    monkeypatch.setattr(loop, "clip_gradients", clip)
    with pytest.raises(
        TrainingStopped, match=r"stopped by SIGTERM after step 1 of code; the last good checkpoint is .*"
    ) as stop:
        learn(config, progress=False)
    assert stop.value.exit_code == 143
    monkeypatch.undo()
    assert len(learn(config, resume=True, progress=False)) == 3


def test_a_finished_stream_is_not_made_again(
    configure: Callable[..., LearnConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure()
    rows = learn(config, progress=False)
    monkeypatch.setattr(stream, "learn_stage", None)
    assert learn(config, resume=True, progress=False) == rows


def test_rows_are_the_losses_of_the_models_that_are_left(configure: Callable[..., LearnConfig]) -> None:
    config = configure(only=1)
    rows = learn(config, progress=False, measure=lambda model, tokenizer: {"training": model.training})
    assert not any(row["training"] for row in rows)
    seen: list[list[float]] = []
    data = stream.read_text(
        config.stages[0].text,
        None,
        Path(config.data or "") / "code",
        tokenizer=load_model(config.model)[1],
        tokenizer_folder=Path(config.model),
        context=16,
        progress=False,
    )
    for folder in (config.model, Path(config.run) / "stages/1-code/model"):
        model = load_model(folder)[0]
        with float64():
            exact = held_out_loss(definition(model), data.heldout, batch_size=4, limit=4)
        seen.append([held_out_loss(model, data.heldout, batch_size=4, limit=4), exact])
    plain, exact = torch.tensor(seen, dtype=torch.float64).T
    assert_within_budget(torch.tensor([row["loss"]["code"] for row in rows]), plain.float(), exact)
    table = (Path(config.run) / "table.md").read_text()
    assert table == markdown_matrix(rows)
    assert table.splitlines()[0] == "| after | background | code |"
    assert table.splitlines()[2].startswith(f"| nothing | {rows[0]['perplexity']['background']:,.2f} |")


def test_divergence_keeps_the_model_to_what_it_was(configure: Callable[..., LearnConfig]) -> None:
    away = []
    for kl in (1e-9, 30.0):
        config = configure(
            memory={"kl": kl, "replay": 0.0, "kl_windows": 4},
            budget={"steps": 20},
            optim={"learning_rate": 5e-3},
            run=configure().run + str(kl),
            only=1,
        )
        learn(config, progress=False)
        log = (Path(config.run) / "stages/1-code/log.jsonl").read_text().splitlines()
        away.append(json.loads(log[-1])["divergence"])
    assert 0 < away[1] < 0.7 * away[0]


def test_replayed_windows_join_the_batch(
    configure: Callable[..., LearnConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    accumulate = loop.accumulate_gradients

    def note(model: Any, input_ids: Tensor, **options: Any) -> Tensor:
        sizes.append(len(input_ids))
        return accumulate(model, input_ids, **options)

    monkeypatch.setattr(loop, "accumulate_gradients", note)
    config = configure(memory={"kl": 0.0, "replay": 0.375}, only=1)
    _, row = learn(config, progress=False)
    assert sizes == [5, 6, 5, 6]
    assert row["tokens"] == 4 * 4 * 16


def test_a_loss_that_is_not_finite_stops_it(configure: Callable[..., LearnConfig]) -> None:
    with pytest.raises(TrainingStopped, match=r"learning code stopped at step .* is not finite|is (nan|inf)") as stop:
        learn(configure(optim={"learning_rate": 1e20, "clip": 1e30, "table_clip": 1e30}), progress=False)
    assert stop.value.exit_code == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": {"background": []}}, "--kl and --replay need text like that of the base model: give"),
        ({"memory": {"kl": -1.0}}, "memory.kl = -1.0: must be 0 or more"),
        ({"memory": {"replay": 1.5}}, "memory.replay = 1.5: must be 0 or more, at most 1"),
        ({"memory": {"kl_windows": 0}}, "memory.kl_windows = 0"),
        ({"memory": {"remember": -1}}, "memory.remember = -1"),
        ({"stages": []}, "there is nothing to learn: name a text"),
        ({"stages": [{"name": "a/b", "text": ["x.txt"]}]}, "stage.name = 'a/b'"),
        ({"stages": [{"name": "a", "text": []}]}, "the text of stage 'a'"),
        ({"stages": [{"name": "background", "text": ["x.txt"]}]}, "would be called 'background'"),
        ({"context": 0}, "the context is 0; a window needs at least 2 tokens"),
        ({"context": 1000}, "this model reads at most 32 tokens"),
        ({"budget": {"tokens": 10}}, "budget.tokens = 10 is less than one step"),
        ({"batch_size": 0}, "batch_size = 0: must be at least 1"),
        ({"model": "nowhere"}, "nowhere is not a folder"),
        (
            {"optim": {"tables": "fused"}, "method": "full"},
            "optim.tables = 'fused' cannot be combined with memory.kl = 0.5, a second backward pass .* take 'exact'",
        ),
        (
            {"method": "pack", "stages": [{"name": "my notes", "text": ["x.txt"]}]},
            "a pack cannot be called 'my notes'; .*; name the text, --text NAME=FILE",
        ),
        (
            {"optim": {"tables": "fused"}, "method": "grow"},
            "optim.tables = 'fused' cannot be combined with method grow",
        ),
    ],
)
def test_mistakes(changes: dict[str, Any], message: str, configure: Callable[..., LearnConfig]) -> None:
    folder = Path(configure().run)
    with pytest.raises(UserError, match=message):
        learn(configure(**changes), progress=False)
    assert not folder.exists()


def test_a_mistake_after_a_stage_has_begun_leaves_what_it_learned(configure: Callable[..., LearnConfig]) -> None:
    config, calls = configure(only=1), iter([{}])

    def measure(model: Any, tokenizer: Any) -> dict[str, Any]:
        for each in calls:
            return each
        raise UserError("there is no such task")

    with pytest.raises(UserError, match="no such task"):
        learn(config, progress=False, measure=measure)
    assert (Path(config.run) / "stages/1-code/model/model.safetensors").is_file()
    assert len(learn(config, resume=True, progress=False)) == 2


def test_text_that_is_too_short(configure: Callable[..., LearnConfig], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a b\n<|endoftext|>\nc d")
    with pytest.raises(UserError, match="less than one window of 16"):
        learn(configure(stages=[{"name": "short", "text": [str(tmp_path / "short.txt")]}]), progress=False)
    stages = [{"name": "code", "text": list(configure().stages[0].text), "heldout": str(tmp_path / "short.txt")}]
    with pytest.raises(UserError, match=r"short\.txt has less than one window of 16 tokens"):
        learn(configure(stages=stages, run=str(tmp_path / "other")), progress=False)


def test_one_document_is_learned_but_for_its_end(
    configure: Callable[..., LearnConfig], texts: Path, tmp_path: Path
) -> None:
    book = tmp_path / "book.txt"
    book.write_text((texts / "code.txt").read_text().replace("\n<|endoftext|>\n", "\n"))
    stages = [{"name": "book", "text": [str(book)]}]
    learn(configure(stages=stages), progress=False)
    splits = Manifest.read(tmp_path / "data" / "book").splits
    assert 0.1 < splits["heldout"].bytes / book.stat().st_size < 0.4
    stages[0]["heldout"] = str(texts / "code.txt")
    learn(configure(stages=stages, run=str(tmp_path / "b"), data=str(tmp_path / "all")), progress=False)
    splits = Manifest.read(tmp_path / "all" / "book").splits
    assert splits["train"].bytes == len(book.read_text().strip())
    assert splits["heldout"].bytes == 0


def test_of_a_short_text_as_much_is_held_out_as_windows_take(
    configure: Callable[..., LearnConfig], tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("\n<|endoftext|>\n".join(f"def x{number}: return" for number in range(60)))
    learn(configure(stages=[{"name": "short", "text": [str(tmp_path / "short.txt")]}], only=1), progress=False)
    heldout = Manifest.read(tmp_path / "data" / "short").splits["heldout"]
    assert heldout.tokens >= 16
    assert heldout.bytes > 150


def test_folders_that_cannot_be_used(configure: Callable[..., LearnConfig]) -> None:
    config = configure(budget={"steps": 1}, only=1)
    with pytest.raises(UserError, match="there is nothing to resume in"):
        learn(config, resume=True, progress=False)
    learn(config, progress=False)
    with pytest.raises(UserError, match="exists already: --resume it, or choose another --output"):
        learn(config, progress=False)
    with pytest.raises(UserError, match=r"cannot resume .*, for seed was 0, now 1"):
        learn(replace(config, seed=1), resume=True, progress=False)


def test_a_stream_that_is_older_than_a_setting_resumes(configure: Callable[..., LearnConfig]) -> None:
    config = configure(budget={"steps": 1}, only=1)
    rows = learn(config, progress=False)
    path = Path(config.run) / "config.json"
    values = json.loads(path.read_text())
    del values["document_start"]
    del values["optim"]["table_moment_columns"]
    path.write_text(json.dumps(values))
    assert learn(config, resume=True, progress=False) == rows
    with pytest.raises(UserError, match=r"cannot resume .*, for document_start was 'auto', now 'none'"):
        learn(replace(config, document_start="none"), resume=True, progress=False)
    other = replace(config, optim=replace(config.optim, table_moment_columns=8))
    with pytest.raises(UserError, match=r"cannot resume .*, for optim was"):
        learn(other, resume=True, progress=False)
