"""What four ranks write is read bit for bit over any mesh, or not at all."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from peerlm.parallel.cut import Cut, cut_rows
from peerlm.parallel.layout import RowLayout
from peerlm.parallel.storage import INDEX, SafetensorsReader, read_shards, write_shards
from peerlm.ranks import join_ranks

from ..processes import ranks

SEGMENTS, VECTORS, WIDTH = (5, 2), 2, 6
VALUES = {"optimizer": {"table": {"step": 3, "beta1": 0.9}}}


def wholes() -> dict[str, Tensor]:
    """Tensors as a model and its optimizer have them: of a table, and others."""
    N = sum(SEGMENTS)
    generator = torch.Generator().manual_seed(0)
    return {
        "table": torch.randn(N, VECTORS, WIDTH, generator=generator),
        "optimizer.table.exp_avg": torch.randn(N, VECTORS, WIDTH, generator=generator).bfloat16(),
        "optimizer.table.exp_avg_sq": torch.rand(N, VECTORS, WIDTH // 3, generator=generator),
        "optimizer.table.weights_step": torch.arange(N, dtype=torch.int32),
        "optimizer.table.learning_rates": torch.empty(0, dtype=torch.float64),
        "norm": torch.randn(7, generator=generator),
        "optimizer.norm.step": torch.tensor(3.0),
    }


def cut(whole: Tensor, layout: RowLayout, row_rank: int, column_rank: int) -> Cut:
    """What a rank has of a tensor that lies as the table does."""
    pieces = [whole[piece.first : piece.first + piece.count] for piece in layout.pieces(row_rank)]
    local = torch.cat([whole[:0], *pieces])
    if whole.ndim == 3:
        column, width = layout.columns(column_rank)
        runs = WIDTH // whole.shape[-1]
        local = local[..., column // runs : (column + width) // runs].contiguous()
    return cut_rows(local, layout, row_rank, column_rank)


def entries(tensors: dict[str, Tensor], layout: RowLayout, row_rank: int, column_rank: int) -> dict[str, Tensor | Cut]:
    sharded = [name for name in tensors if "table" in name and "rates" not in name]
    return {
        name: cut(tensor, layout, row_rank, column_rank) if name in sharded else tensor
        for name, tensor in tensors.items()
    }


def layout_of(rows: int, cols: int) -> RowLayout:
    return RowLayout(segments=SEGMENTS, width=WIDTH, rows=rows, cols=cols)


def save_on_four(folder: Path) -> None:
    with join_ranks("cpu") as us:
        found = entries(wholes(), layout_of(2, 2), us.rank % 2, us.rank // 2)
        dense = distribute_tensor(torch.arange(10.0), init_device_mesh("cpu", (4,)), [Shard(0)])
        for _ in range(2):  # the second time the plan is known
            write_shards(folder, {**found, "dense": dense}, VALUES, group=us.files)
        read = torch.zeros_like(dense)
        read_shards(SafetensorsReader.of_shards(folder), {"dense": read}, group=us.files)
        assert torch.equal(read.full_tensor(), torch.arange(10.0))
        if us.rank == 1:
            (folder / "rank-00001.safetensors").rename(folder / "aside")
        us.wait()
        with pytest.raises(OSError, match=r"rank-00001\.safetensors"):
            read_shards(SafetensorsReader.of_shards(folder), {"dense": read}, group=us.files)
        us.wait()
        if us.rank == 1:
            (folder / "aside").rename(folder / "rank-00001.safetensors")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    with ranks(4, tmp_path_factory.mktemp("ranks"), save_on_four, folder) as processes:
        assert processes.wait() == [0, 0, 0, 0], processes.said()
    return folder


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (2, 1), (3, 1), (8, 1), (1, 2), (2, 2)])
def test_any_mesh_reads_the_same_bits(saved: Path, rows: int, cols: int) -> None:
    reader, layout = SafetensorsReader.of_shards(saved), layout_of(rows, cols)
    expected = {**wholes(), "dense": torch.arange(10.0)}
    for row_rank in range(rows):
        for column_rank in range(cols):
            empty = {name: torch.full_like(tensor, 7) for name, tensor in expected.items()}
            found = entries(empty, layout, row_rank, column_rank)
            read_shards(reader, found, group=None)
            wanted = entries(expected, layout, row_rank, column_rank)
            for name, entry in found.items():
                if isinstance(entry, Cut):
                    assert entry.shape == wanted[name].shape
                    assert all(torch.equal(block, wanted[name].block(place)) for place, block in entry.blocks), name
                else:
                    assert torch.equal(entry, wanted[name]), name
    assert reader.values == VALUES


def test_each_entry_is_written_once_by_the_rank_that_has_it(saved: Path) -> None:
    index = json.loads((saved / INDEX).read_text())["tensors"]
    for name, entry in index.items():
        covered = torch.zeros(entry["shape"], dtype=torch.int32)
        for block in entry["blocks"]:
            covered[tuple(slice(a, a + n) for a, n in zip(block["offsets"], block["shape"], strict=True))] += 1
        assert (covered == 1).all(), name
    assert {block["file"] for block in index["table"]["blocks"]} == {
        f"rank-{rank:05d}.safetensors" for rank in range(4)
    }
    assert not list(saved.glob("*.metadata"))


def test_a_block_that_the_index_lacks_is_never_left_out_silently(saved: Path, tmp_path: Path) -> None:
    index = json.loads((saved / INDEX).read_text())
    del index["tensors"]["table"]["blocks"][1]
    for path in saved.iterdir():
        os.link(path, tmp_path / path.name)
    (tmp_path / INDEX).unlink()
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"the checkpoint has \d+ of the 84 entries of table that belong here"):
        read_shards(SafetensorsReader.of_shards(tmp_path), {"table": wholes()["table"]}, group=None)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"other": torch.zeros(1)}, "the checkpoint has no other"),
        (
            {"norm": torch.zeros(8)},
            r"norm is \(8,\) in torch.float32 here, and \(7,\) in torch.float32 in the checkpoint",
        ),
        ({"norm": torch.zeros(7).double()}, r"norm is \(7,\) in torch.float64 here"),
    ],
)
def test_what_does_not_fit_is_refused(saved: Path, entry: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_shards(SafetensorsReader.of_shards(saved), entry, group=None)


def test_a_process_alone_writes_and_reads_too(tmp_path: Path) -> None:
    tensors = wholes()
    files = write_shards(tmp_path, tensors, VALUES, group=None)
    assert list(files) == ["rank-00000.safetensors"]
    read = {name: torch.full_like(tensor, 7) for name, tensor in tensors.items()}
    read_shards(SafetensorsReader.of_shards(tmp_path), read, group=None)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
