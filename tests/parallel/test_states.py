"""What is saved over one mesh is loaded over any other, bit for bit, and exported with no table whole in a process."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from peerlm import files as files_module
from peerlm.errors import PeerlmWarning
from peerlm.model import PeerConfig, PeerForCausalLM
from peerlm.optim import RowAdamW, parameter_groups
from peerlm.parallel import build, cut, from_pretrained, mesh, save_pretrained
from peerlm.parallel.states import model_entries
from peerlm.parallel.storage import SafetensorsReader, read_shards
from peerlm.ranks import ALONE, Ranks
from peerlm.train.checkpoint import (
    TrainState,
    checkpoint_folder,
    load_checkpoint,
    save_shards,
    shards_of,
)
from peerlm.train.space import checkpoint_bytes

from .together import together

STATE = TrainState(step=3, position=24, tokens=96)
IDS = torch.arange(12).view(2, 6) % 11


def config() -> PeerConfig:
    peer = {"num_experts": 25, "heads": 2, "experts_per_head": 2, "key_dim": 4}
    return PeerConfig(vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=1, peer=peer)


def optimizer_of(model: Any, settings: dict[str, Any]) -> RowAdamW:
    return RowAdamW(parameter_groups(model), lr=0.05, **settings)


def take_steps(model: Any, optimizer: RowAdamW, count: int, rank: int) -> None:
    for number in range(count):
        ids = (IDS * (1 + number) + rank) % 11
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def us(rank: int, world: int) -> Ranks:
    return Ranks(rank=rank, world_size=world, device=torch.device("cpu"), files=dist.group.WORLD)


def save(run: Path, model: Any, optimizer: RowAdamW, ranks: Ranks) -> None:
    save_shards(run, STATE, shards_of(model, optimizer), None, keep=2, ranks=ranks)


def train_and_save(
    rank: int, world: int, shape: tuple[int, int], settings: dict[str, Any], run: Path, out: Path
) -> Tensor:
    """Train, save, train on; resume from the save, and reach the same bits."""
    ranks, cut = us(rank, world), mesh(rows=shape[0], cols=shape[1], replica=world // (shape[0] * shape[1]))
    torch.manual_seed(0)
    model = build(config(), cut)
    optimizer = optimizer_of(model, settings)
    take_steps(model, optimizer, 3, rank)
    with torch.no_grad():
        model(input_ids=IDS)  # FSDP2 then keeps what it has gathered
    save(run, model, optimizer, ranks)
    take_steps(model, optimizer, 2, rank)
    torch.manual_seed(1)
    resumed = build(config(), cut)
    its_optimizer = optimizer_of(resumed, settings)
    assert load_checkpoint(checkpoint_folder(run, 3), resumed, its_optimizer, ranks=ranks) == STATE
    take_steps(resumed, its_optimizer, 2, rank)
    for name, entry in shards_of(resumed, its_optimizer).entries.items():
        assert alike(entry, shards_of(model, optimizer).entries[name]), name
    save_pretrained(model, out)
    return model.eval()(input_ids=IDS).logits.detach()


def alike(one: Any, other: Any) -> bool:
    if hasattr(one, "blocks"):
        return all(torch.equal(block, other.block(place)) for place, block in one.blocks)
    local = [each.to_local() if hasattr(each, "to_local") else each for each in (one, other)]
    return torch.equal(*local)


def load_and_save(
    rank: int, world: int, shape: tuple[int, int], settings: dict[str, Any], source: Path, run: Path
) -> None:
    ranks = us(rank, world)
    model = build(config(), mesh(rows=shape[0], cols=shape[1], replica=world // (shape[0] * shape[1])))
    optimizer = optimizer_of(model, settings)
    assert load_checkpoint(checkpoint_folder(source, 3), model, optimizer, ranks=ranks) == STATE
    save(run, model, optimizer, ranks)


def content(run: Path) -> tuple[dict[str, Tensor], Any]:
    """Everything in a checkpoint, whole."""
    reader = SafetensorsReader.of_shards(checkpoint_folder(run, 3))
    tensors = {name: torch.zeros(found.size, dtype=found.properties.dtype) for name, found in reader.tensors.items()}
    read_shards(reader, tensors, group=None)
    return tensors, reader.values


@pytest.mark.parametrize(
    ("shape", "settings"), [((4, 1), {}), ((2, 2), {"row_wise": 4, "betas": (0.0, 0.99), "lazy": True})]
)
def test_a_checkpoint_passes_through_any_mesh_unchanged(
    tmp_path: Path, shape: tuple[int, int], settings: dict[str, Any]
) -> None:
    four, one, out = tmp_path / "four", tmp_path / "one", tmp_path / "out"
    logits = together(train_and_save, 4, shape, settings, four, out)
    expected = content(four)
    torch.manual_seed(2)
    model = PeerForCausalLM(config())
    optimizer = optimizer_of(model, settings)
    assert load_checkpoint(checkpoint_folder(four, 3), model, optimizer) == STATE
    save(one, model, optimizer, ALONE)
    runs = [one]
    for number, (each, world) in enumerate([((2, 1), 4), ((4, 2), 8), (shape, 4)]):  # the first has two copies
        runs.append(tmp_path / f"run{number}")
        together(load_and_save, world, each, settings, runs[-2], runs[-1])
    for run in runs:
        tensors, values = content(run)
        assert tensors.keys() == expected[0].keys()
        assert values == expected[1]
        assert all(torch.equal(tensor, expected[0][name]) for name, tensor in tensors.items())
    assert torch.isfinite(logits[0]).all()
    exported = AutoModelForCausalLM.from_pretrained(out).eval()
    for found in logits:
        torch.testing.assert_close(exported(input_ids=IDS).logits, found)


def save_in_small_files(rank: int, world: int, run: Path) -> tuple[int, tuple[int, int], str]:
    """Bytes in the largest of files with a tiny limit; those foreseen and found; what is said of a full disk."""
    cut.MOST_BYTES = 2000
    try:
        model = build(config(), mesh(rows=2, replica=2))
        optimizer = optimizer_of(model, {})
        take_steps(model, optimizer, 2, rank)
        ranks = us(rank, world)
        save(run, model, optimizer, ranks)
        foreseen = checkpoint_bytes(optimizer)[1]
        files = list(checkpoint_folder(run, 3).glob("rank-*.safetensors"))
        resumed = build(config(), mesh(rows=1, cols=4))
        assert load_checkpoint(checkpoint_folder(run, 3), resumed, optimizer_of(resumed, {}), ranks=ranks) == STATE
    finally:
        cut.MOST_BYTES = 50 * 10**9
    disk, files_module.free_bytes = files_module.free_bytes, lambda folder: 1000
    said = []
    for write in (
        lambda: save_shards(run, TrainState(step=4), shards_of(model, optimizer), None, keep=2, ranks=ranks),
        lambda: save_pretrained(model, run / "out"),
    ):
        try:
            write()
        except OSError as error:
            said.append(str(error))
    files_module.free_bytes = disk
    assert len(said) == 2
    sizes = [each.stat().st_size - 8 - int.from_bytes(each.read_bytes()[:8], "little") for each in files]
    return max(sizes), (foreseen, sum(sizes)), said[0]


def test_large_tables_are_saved_in_several_files_and_only_where_there_is_room(tmp_path: Path) -> None:
    for largest, (foreseen, found), said in together(save_in_small_files, 4, tmp_path):
        assert largest <= 2000
        assert foreseen == pytest.approx(found, rel=0.5)
        assert "step-00000004 needs" in said
    names = {path.name for path in checkpoint_folder(tmp_path, 3).iterdir()}
    assert {"rank-00000.safetensors", "rank-00000-2.safetensors"} <= names
    assert not (tmp_path / "out").exists()


def export_a_large_table(rank: int, world: int, folder: Path) -> list[str]:
    """What is said of a table whose file is larger than those of a checkpoint."""
    cut.MOST_BYTES = 1000
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            save_pretrained(build(config(), mesh(rows=world)), folder / "out")
    finally:
        cut.MOST_BYTES = 50 * 10**9
    return [str(each.message) for each in said if each.category is PeerlmWarning]


def test_a_table_that_one_file_must_hold_is_named_once(tmp_path: Path) -> None:
    (told,), others = together(export_a_large_table, 2, tmp_path)
    assert others == []
    assert re.fullmatch(r"model\..*\.rows takes .* GB in one file, model-00002-of-00002\.safetensors, for .*", told)


def load_exported(rank: int, world: int, shape: tuple[int, int], folder: Path, again: Path) -> None:
    model = from_pretrained(folder, mesh(rows=shape[0], cols=shape[1], replica=world // (shape[0] * shape[1])))
    save_pretrained(model, again)


def test_an_exported_folder_is_loaded_over_a_mesh_and_written_again(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = PeerForCausalLM(config()).eval()
    model.save_pretrained(tmp_path / "whole")
    source = tmp_path / "whole"
    for number, (shape, world) in enumerate([((3, 1), 3), ((2, 2), 4), ((1, 2), 4)]):  # the last has two copies
        together(load_exported, world, shape, source, tmp_path / f"out{number}")
        source = tmp_path / f"out{number}"
    assert len(list(source.glob("model-*-of-00002.safetensors"))) == 2  # of the table, and of the rest
    loaded = AutoModelForCausalLM.from_pretrained(source).eval()
    assert type(loaded) is PeerForCausalLM
    expected = model_entries(model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model_entries(loaded).items())
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
