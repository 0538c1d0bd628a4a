"""Checkpoints in shards: safetensors files and an index in JSON, by the planners of torch.distributed.checkpoint.

rank-00003.safetensors holds what rank 3 wrote, rank-00003-2.safetensors what did not fit into 50 GB. Entry
"NAME|8,0,64" is the block of tensor NAME that begins there.
index.json has the shape and dtype of each tensor, its blocks and their files, and values that are no tensors. Nothing
is unpickled.
"""

import json
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from peerlm.files import fingerprint, sync, write_json
from peerlm.ops.tensor_files import DTYPES
from peerlm.ops.watched import raw
from peerlm.parallel import cut
from peerlm.parallel.cut import Cut

INDEX = "index.json"
Entries = Mapping[str, "Tensor | Cut"]
"""Tensors by name, whole, cut, or DTensors."""


def write_shards(
    folder: Path, entries: Entries, values: object, *, group: "dist.ProcessGroup | None"
) -> dict[str, dict[str, int]]:
    """Write this rank's part of `entries` into a folder, which is there; each rank of the group must call it.

    Args:
        folder: empty, the same for all ranks.
        entries: what is saved; whole tensors must be the same on all ranks, of which one writes them.
        values: anything that JSON can hold; that of the group's first rank is saved.
        group: gloo; None: this process alone.

    Returns:
        "bytes" and "crc32" of each file of shards, on the group's first rank; {} on the others.

    Raises:
        OSError: on every rank, the first that any of them met.
    """
    writer = SafetensorsWriter(folder, values)
    planner = ShardSavePlanner(folder.parent, group)
    with _failures_of_all():
        dcp.save(
            {name: _readable(entry) for name, entry in sorted(entries.items())},  # the order decides who writes what
            storage_writer=writer,
            planner=planner,
            process_group=group,
            no_dist=group is None,
        )
    return writer.fingerprints


def num_bytes(entries: Entries) -> int:
    """Bytes of what all ranks write of these together; the same on each."""
    return sum(entry.size().numel() * entry.dtype.itemsize for entry in entries.values())


def read_shards(
    reader: "SafetensorsReader", entries: Entries, *, group: "dist.ProcessGroup | None", cast: bool = False
) -> None:
    """Fill tensors, in place, with what was saved under their names, whoever wrote it; each rank must call it.

    With `cast` a tensor may have been saved in another dtype.

    Raises:
        ValueError: on every rank: a tensor was saved in another shape or dtype, not at all, or not wholly.
        OSError: on every rank: a file cannot be read.
    """
    with _failures_of_all():
        dcp.load(
            {name: _readable(entry) for name, entry in entries.items()},
            storage_reader=reader,
            planner=ShardLoadPlanner(cast=cast),
            process_group=group,
            no_dist=group is None,
        )


class ShardSavePlanner(DefaultSavePlanner):
    """The default planner, for entries that may be `Cut`.

    Ranks send each other what has changed in their plans since the last save of the same ranks into the same place.
    """

    def __init__(self, place: Path, group: "dist.ProcessGroup | None") -> None:
        cached = group is not None
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False, enable_plan_caching=cached)
        if cached:  # by default all saves of a process share one plan, those of other models and ranks too
            self._cached_plans_key = f"{place.absolute()} by {dist.get_world_size(group)}"

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The tensor that is written for an item of the plan."""
        entry = self.state_dict[index.fqn]
        return entry.block(index.offset) if isinstance(entry, Cut) else super().lookup_object(index)


class ShardLoadPlanner(DefaultLoadPlanner):
    """The default planner, for entries that may be `Cut`; it refuses what would be left as it was."""

    def __init__(self, *, cast: bool) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.cast = cast

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Keep what is to be filled, and what was saved."""
        self.state_dict, self.original_state_dict = state_dict, state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        """What is read for this rank; raises ValueError where that does not cover it."""
        assert self.metadata is not None
        saved: dict[str, Any] = self.metadata.state_dict_metadata
        for name, entry in self.state_dict.items():
            if name not in saved:
                raise ValueError(f"the checkpoint has no {name}")
            found = saved[name]
            if found.size != entry.size() or not (self.cast or found.properties.dtype == entry.dtype):
                raise ValueError(
                    f"{name} is {tuple(entry.size())} in {entry.dtype} here, and {tuple(found.size)} in "
                    f"{found.properties.dtype} in the checkpoint"
                )
        plan = super().create_local_plan()
        read: dict[str, int] = defaultdict(int)
        for item in plan.items:
            read[item.dest_index.fqn] += math.prod(item.lengths)
        for name, entry in self.state_dict.items():
            wanted = _num_local(entry)
            if read[name] != wanted:
                raise ValueError(f"the checkpoint has {read[name]} of the {wanted} entries of {name} that belong here")
        return plan

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The tensor that is filled by an item of the plan."""
        entry: Any = self.state_dict[index.fqn]
        return entry.block(index.offset) if isinstance(entry, Cut) else super().lookup_tensor(index)


class SafetensorsWriter(StorageWriter):
    """Writes a file for each rank, and the index on the first one."""

    def __init__(self, folder: Path, values: object) -> None:
        self.folder, self.values = folder, values
        self.fingerprints: dict[str, dict[str, int]] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between saves."""

    def set_up_storage_writer(self, is_coordinator: bool, *arguments: Any, **options: Any) -> None:
        """The folder is there."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """As they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the plan's tensors into this rank's file, on the disk when it returns."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        written: list[WriteResult] = []
        for number, items in enumerate(_files(plan.items, planner), start=1):
            name = f"rank-{rank:05d}{'' if number == 1 else f'-{number}'}.safetensors"
            tensors = {_key(item.index): _on_cpu(planner.resolve_data(item)) for item in items}
            path = self.folder / name
            save_file(tensors, path)
            sync(path)
            seen = {"file": name, **fingerprint(path)}
            written += [WriteResult(item.index, tensors[_key(item.index)].nbytes, seen) for item in items]
        done: Future[list[WriteResult]] = Future()
        done.set_result(written)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index of what all ranks have written."""
        seen = {_key(result.index): result.storage_data for each in results for result in each}
        tensors = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            tensors[name] = {
                "dtype": str(entry.properties.dtype).removeprefix("torch."),
                "shape": list(entry.size),
                "blocks": [
                    {
                        "offsets": list(chunk.offsets),
                        "shape": list(chunk.sizes),
                        "file": seen[_key(MetadataIndex(name, chunk.offsets))]["file"],
                    }
                    for chunk in entry.chunks
                ],
            }
        write_json(self.folder / INDEX, {"tensors": tensors, "values": self.values})
        for result in seen.values():
            self.fingerprints[result["file"]] = {key: result[key] for key in ("bytes", "crc32")}

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """It is never guessed from a path."""
        return False

    def storage_meta(self) -> StorageMeta | None:
        """There is none."""
        return None


def _files(items: Sequence[WriteItem], planner: SavePlanner) -> Iterator[list[WriteItem]]:
    """What goes into each file of a rank, in order."""
    together: list[WriteItem] = []
    size = 0
    for item in items:
        tensor: Any = planner.resolve_data(item)
        if together and size + tensor.nbytes > cut.MOST_BYTES:
            yield together
            together, size = [], 0
        together.append(item)
        size += tensor.nbytes
    if together:
        yield together


class SafetensorsReader(StorageReader):
    """Reads parts of tensors from safetensors files.

    Attributes:
        tensors: by name, their shapes, dtypes and blocks.
        places: by name and offsets of a block, its file and its name in that.
        values: what was saved besides tensors.
    """

    def __init__(
        self,
        tensors: dict[str, TensorStorageMetadata],
        places: dict[tuple[str, tuple[int, ...]], tuple[Path, str]],
        values: Any = None,
    ) -> None:
        self.tensors, self.places, self.values = tensors, places, values

    @classmethod
    def of_shards(cls, folder: Path) -> "SafetensorsReader":
        """Of what `write_shards` wrote; raises ValueError or OSError where the index cannot be read."""
        index = json.loads((folder / INDEX).read_bytes())
        tensors, places = {}, {}
        for name, entry in index["tensors"].items():
            chunks = []
            for block in entry["blocks"]:
                offsets = torch.Size(block["offsets"])
                chunks.append(ChunkStorageMetadata(offsets, torch.Size(block["shape"])))
                places[name, tuple(offsets)] = folder / block["file"], _key(MetadataIndex(name, offsets))
            tensors[name] = _metadata(getattr(torch, entry["dtype"]), entry["shape"], chunks)
        return cls(tensors, places, index["values"])

    @classmethod
    def of_files(cls, *paths: Path) -> "SafetensorsReader":
        """Of whole tensors in safetensors files; names as they are there."""
        tensors, places = {}, {}
        for path in paths:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118, no mapping
                    entry = file.get_slice(name)
                    shape = torch.Size(entry.get_shape())
                    offsets = torch.Size([0] * len(shape))
                    tensors[name] = _metadata(DTYPES[entry.get_dtype()], shape, [ChunkStorageMetadata(offsets, shape)])
                    places[name, tuple(offsets)] = path, name
        return cls(tensors, places)

    def renamed(self, names: Mapping[str, str]) -> "SafetensorsReader":
        """The tensors of these names alone, by the names that stand for them."""
        return SafetensorsReader(
            {new: self.tensors[old] for old, new in names.items()},
            {(names[name], offsets): place for (name, offsets), place in self.places.items() if name in names},
            self.values,
        )

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between loads."""

    def read_metadata(self, *arguments: Any) -> Metadata:
        """What was saved."""
        return Metadata(state_dict_metadata=dict(self.tensors))

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *arguments: Any) -> None:
        """The files are there."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the plan's tensors, a file at a time, by no more than their part of each block."""
        by_file: dict[Path, list[tuple[str, ReadItem]]] = defaultdict(list)
        for item in plan.items:
            path, key = self.places[item.storage_index.fqn, tuple(item.storage_index.offset or ())]
            by_file[path].append((key, item))
        for path, items in by_file.items():
            with safe_open(path, framework="pt") as file:
                for key, item in items:
                    target = planner.resolve_tensor(item)
                    target.copy_(_part(file, key, item))
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """It is never guessed from a path."""
        return False


@contextmanager
def _failures_of_all() -> Iterator[None]:
    """Raise what failed on the first of the ranks where anything did; and say nothing of a process that is alone."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
            yield
    except CheckpointException as error:  # no Exception, which those that handle errors would not see
        failures = error.failures
    else:
        return
    first, _ = failures[min(failures)]
    raise first if isinstance(first, Exception) else RuntimeError(str(first))


def _readable(entry: "Tensor | Cut") -> "Tensor | Cut":
    """What can be read and filled in place, without gradients, and without letting stale rows catch up."""
    return entry if isinstance(entry, Cut) else raw(entry).detach()


def _num_local(entry: Any) -> int:
    if isinstance(entry, Cut):
        return sum(block.numel() for _, block in entry.blocks)
    return int(entry.to_local().numel() if hasattr(entry, "to_local") else entry.numel())


def _key(index: MetadataIndex) -> str:
    return f"{index.fqn}|{','.join(map(str, index.offset or ()))}"


def _metadata(dtype: torch.dtype, shape: Any, chunks: list[ChunkStorageMetadata]) -> TensorStorageMetadata:
    return TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), chunks)


def _on_cpu(tensor: Any) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _part(file: Any, key: str, item: ReadItem) -> Tensor:
    if not item.lengths:
        return file.get_tensor(key)
    ranges = zip(item.storage_offsets, item.lengths, strict=True)
    return file.get_slice(key)[tuple(slice(begin, begin + count) for begin, count in ranges)]
