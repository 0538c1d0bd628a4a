"""Checkpoints: complete, pruned, checked when read."""

import errno
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from peerlm.convert.saved import load_saved
from peerlm.errors import UserError
from peerlm.evaluate.loading import _of_shards, model_folder
from peerlm.model import PeerConfig, PeerForCausalLM
from peerlm.optim import RowAdamW, parameter_groups
from peerlm.parallel import storage
from peerlm.parallel.states import load_states, reader_of
from peerlm.ranks import ALONE
from peerlm.testing import relative_error
from peerlm.train import CheckpointConfig
from peerlm.train.checkpoint import (
    TrainState,
    checkpoint_folder,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    save_shards,
    shards_of,
)
from peerlm.train.saving import Saver


def build(seed: int) -> tuple[PeerForCausalLM, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    peer = {"num_experts": 16, "heads": 1, "experts_per_head": 2, "key_dim": 4}
    config = PeerConfig(vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=1, peer=peer)
    model = PeerForCausalLM(config)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)


def step(model: PeerForCausalLM, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    ids = torch.randint(11, (2, 6))
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model, optimizer = build(0)
    for number in (1, 2, 3):
        step(model, optimizer, seed=number)
        save_checkpoint(tmp_path, TrainState(step=number, seconds=0.5), model, optimizer, None, keep=2)
    return tmp_path


@dataclass(frozen=True)
class Between:
    """A checkpoint between two steps, whose rows are stale, and what they are once up to date."""

    folder: Path
    stale: Tensor
    rows: Tensor


def build_between() -> tuple[PeerForCausalLM, torch.optim.Optimizer]:
    torch.manual_seed(0)
    peer = {"num_experts": 256, "heads": 1, "experts_per_head": 2, "key_dim": 4}
    config = PeerConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, peer=peer)
    model = PeerForCausalLM(config)
    return model, RowAdamW(parameter_groups(model), lr=0.1)


@pytest.fixture
def between(tmp_path: Path) -> Between:
    model, optimizer = build_between()
    for number in range(4):
        step(model, optimizer, seed=number)
    folder = save_checkpoint(tmp_path, TrainState(step=4), model, optimizer, None, keep=2)
    return Between(folder, load_file(folder / "model.safetensors")[ROWS], model.state_dict()[ROWS])


ROWS = "model.layers.0.ffw.experts.rows"
LOADERS: dict[str, Callable[[Path], PreTrainedModel]] = {
    "AutoModelForCausalLM": AutoModelForCausalLM.from_pretrained,
    "PeerForCausalLM": PeerForCausalLM.from_pretrained,
    "AutoModel": AutoModel.from_pretrained,
    "with a report": lambda folder: PeerForCausalLM.from_pretrained(folder, output_loading_info=True)[0],
    "from a subfolder": lambda folder: PeerForCausalLM.from_pretrained(folder.parent, subfolder=folder.name),
    "load_saved": load_saved,
}


@pytest.mark.parametrize("loader", LOADERS)
def test_stale_rows_are_up_to_date_however_a_checkpoint_is_loaded(
    loader: str, between: Between, tmp_path: Path
) -> None:
    assert not torch.equal(between.stale, between.rows)
    model = LOADERS[loader](between.folder)
    (found,) = (value for name, value in model.state_dict().items() if ROWS.endswith(name))
    assert torch.equal(found, between.rows)
    model.save_pretrained(tmp_path / "again")
    assert "stale" not in (tmp_path / "again" / "config.json").read_text()


def test_stale_rows_are_up_to_date_in_another_dtype(between: Between) -> None:
    model = AutoModelForCausalLM.from_pretrained(between.folder, dtype=torch.bfloat16)
    found = model.state_dict()[ROWS]
    assert found.dtype == torch.bfloat16
    two_roundings = torch.finfo(torch.bfloat16).eps
    assert relative_error(found, between.rows) < two_roundings < relative_error(between.stale, between.rows)


def test_stale_rows_without_the_state_of_their_optimizer_are_refused(between: Between) -> None:
    (between.folder / "optimizer.safetensors").unlink()
    with pytest.raises(ValueError, match=r"rows in .* are stale.*: put optimizer\.safetensors of the same checkpoint"):
        AutoModelForCausalLM.from_pretrained(between.folder)


def test_what_is_loaded_goes_on_as_what_was_saved(saved: Path) -> None:
    straight = build(0)
    for number in (1, 2, 3, 4):
        step(*straight, seed=number)
    resumed = build(7)
    state = load_checkpoint(checkpoint_folder(saved, 3), *resumed)
    step(*resumed, seed=4)
    assert state == TrainState(step=3, seconds=0.5)
    expected, found = straight[0].state_dict(), resumed[0].state_dict()
    assert any(name.endswith("running_mean") for name in expected)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("kind", ["dense", "exact"])
def test_what_is_written_in_the_background_is_the_run_as_it_was(kind: str, tmp_path: Path) -> None:
    def make(seed: int) -> tuple[PeerForCausalLM, torch.optim.Optimizer]:
        model, optimizer = build(seed)
        return model, optimizer if kind == "dense" else RowAdamW(parameter_groups(model), lr=0.1)

    model, optimizer = make(0)
    for number in (1, 2, 3):
        step(model, optimizer, seed=number)
    saver = Saver(CheckpointConfig(background=True), ALONE)
    saver.save(tmp_path, TrainState(step=3), model, optimizer, None)
    step(model, optimizer, seed=4)
    saver.wait()
    resumed, its_optimizer = make(7)
    folder = checkpoint_folder(tmp_path, 3)
    assert load_checkpoint(folder, resumed, its_optimizer) == TrainState(step=3)
    assert not (folder / "config.json").exists()
    step(resumed, its_optimizer, seed=4)
    expected, found = model.state_dict(), resumed.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_what_the_background_cannot_write_is_raised_by_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "save_file", fail)
    model, optimizer = build(0)
    saver = Saver(CheckpointConfig(background=True), ALONE)
    saver.save(tmp_path, TrainState(step=3), model, optimizer, None)
    with pytest.raises(OSError, match="No space left on device"):
        saver.save(tmp_path, TrainState(step=4), model, optimizer, None)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_checkpoint_of_whole_files_is_read_by_name(between: Between) -> None:
    """As a model that is spread over ranks reads it, each its part."""
    kinds = [build_between() for _ in range(2)]
    load_checkpoint(between.folder, *kinds[0])
    load_states(*kinds[1], reader_of(between.folder), group=None)
    for model, optimizer in kinds:
        step(model, optimizer, seed=9)
    (expected, _), (found, _) = kinds
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in expected.state_dict().items())


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    model, optimizer = build(0)
    step(model, optimizer, seed=1)
    for number in (1, 2):
        save_shards(tmp_path, TrainState(step=number), shards_of(model, optimizer), None, keep=2, ranks=ALONE)
    folder = checkpoint_folder(tmp_path, 2)
    flip(folder / "rank-00000.safetensors")
    with pytest.raises(
        UserError, match=r"damaged \(rank-00000.safetensors is missing or changed\).*from step-00000001"
    ):
        load_checkpoint(folder, *build(7))


def test_a_checkpoint_in_shards_is_a_model_for_evaluation_with_rows_up_to_date(tmp_path: Path) -> None:
    model, optimizer = build_between()
    for number in range(4):
        step(model, optimizer, seed=number)
    shards = shards_of(model, optimizer)
    folder = save_shards(tmp_path, TrainState(step=4), shards, None, keep=2, ranks=ALONE)
    written: Any = shards.entries[ROWS]
    stale = written.clone()
    with pytest.raises(UserError, match="is a checkpoint in shards, which peerlm eval and generate read alone"):
        load_saved(folder)
    assert model_folder(tmp_path) == folder
    loaded = _of_shards(folder)
    assert (loaded.state_dict()[ROWS] - stale).abs().max() > 1e-4
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_shards_of_another_model_are_refused(tmp_path: Path) -> None:
    model, optimizer = build(0)
    save_shards(tmp_path, TrainState(step=1), shards_of(model, optimizer), None, keep=2, ranks=ALONE)
    other, its_optimizer = build_between()
    with pytest.raises(UserError, match=r"step-00000001 cannot be loaded: "):
        load_checkpoint(checkpoint_folder(tmp_path, 1), other, its_optimizer)


def test_only_the_newest_are_kept(saved: Path) -> None:
    assert [folder.name for folder in list_checkpoints(saved)] == ["step-00000002", "step-00000003"]


def test_a_checkpoint_is_a_model_for_transformers(saved: Path) -> None:
    model, optimizer = build(7)
    load_checkpoint(checkpoint_folder(saved, 3), model, optimizer)
    loaded = PeerForCausalLM.from_pretrained(checkpoint_folder(saved, 3))
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_order_is_by_step_not_by_name(tmp_path: Path) -> None:
    for number in (99_999_999, 100_000_000):
        checkpoint_folder(tmp_path, number).mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-of-mine").mkdir()
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-99999999", "step-100000000"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "config.json", "state.json"])
@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink, lambda path: path.write_bytes(b"")])
def test_damage_is_named_and_the_older_checkpoint_with_it(
    saved: Path, name: str, damage: Callable[[Path], object]
) -> None:
    folder = checkpoint_folder(saved, 3)
    damage(folder / name)
    model, optimizer = build(7)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_checkpoint(folder, model, optimizer)
    assert str(error.value) == (
        f"the checkpoint {folder} is damaged ({name} is missing or changed): delete it and --resume again; "
        "the run then resumes from step-00000002"
    )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_damage_to_the_only_checkpoint_says_that_the_run_starts_again(saved: Path) -> None:
    folder = checkpoint_folder(saved, 2)
    truncate(folder / "model.safetensors")
    with pytest.raises(UserError, match="it starts again, for no older one is left"):
        load_checkpoint(folder, *build(7))


@pytest.mark.parametrize("content", ["[]", "{}", '{"step": 4}'])
def test_a_state_of_another_shape_is_damage(saved: Path, content: str) -> None:
    (checkpoint_folder(saved, 3) / "state.json").write_text(content)
    with pytest.raises(UserError, match=r"state.json is missing or changed"):
        load_checkpoint(checkpoint_folder(saved, 3), *build(7))


def test_a_changed_number_in_the_state_is_damage(saved: Path) -> None:
    path = checkpoint_folder(saved, 3) / "state.json"
    path.write_text(path.read_text().replace('"step": 3', '"step": 4'))
    with pytest.raises(UserError, match=r"state.json is missing or changed"):
        load_checkpoint(checkpoint_folder(saved, 3), *build(7))


def test_the_state_says_where_the_run_stood(saved: Path) -> None:
    values = json.loads((checkpoint_folder(saved, 3) / "state.json").read_text())
    assert (values["step"], values["seconds"]) == (3, 0.5)
    assert set(values["files"]) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "open_with_peerlm.py",
        "optimizer.safetensors",
    }
