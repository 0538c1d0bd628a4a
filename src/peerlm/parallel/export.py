"""Folders for Hugging Face's `from_pretrained` of models over a mesh, written and read without a whole table anywhere.

Each sharded table has a file of its own, into which every rank writes its rows where they belong. All else is in the
first file. transformers reads a tensor from one file, so that a table has one, however large it is.
"""

import json
import os
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from peerlm.errors import PeerlmWarning
from peerlm.files import require_space, sync, write_json
from peerlm.layers.mapped.table import MappedTable, mapped_tables
from peerlm.model import PeerConfig, PeerForCausalLM
from peerlm.ops.row_keeping import rows_stay_in_files
from peerlm.ops.tensor_files import head_of
from peerlm.ops.watched import raw
from peerlm.optim.saved import STALE
from peerlm.parallel import cut
from peerlm.parallel.models import build
from peerlm.parallel.states import model_entries
from peerlm.parallel.storage import INDEX, SafetensorsReader, num_bytes, read_shards
from peerlm.parallel.table import ShardedTable, sharded_tables
from peerlm.ranks import ALONE, Ranks

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_BYTES_AT_ONCE = 1 << 26


def save_pretrained(model: Any, folder: str | Path, *, ranks: Ranks | None = None) -> None:
    """Write a model over a mesh for `from_pretrained`, whole or not at all; each rank must call it.

    The folder must be the same for all ranks. No process holds more of a table at once than its own part and 64 MiB;
    what is not a table is gathered on the first one.

    Args:
        model: a transformers model, as of `build` or `parallelize`.
        folder: what is there is replaced.
        ranks: who writes; None: the ranks of torch.distributed.
    """
    ranks = _ranks() if ranks is None else ranks
    with ranks.atomic_folder(Path(folder)) as partial:
        write_pretrained(model, partial, ranks=ranks)


def write_pretrained(model: Any, folder: Path, *, ranks: Ranks) -> None:
    """As `save_pretrained`, into a folder that is there."""
    tables = sharded_tables(model)
    for table in tables.values():
        table.catch_up()
    parts = dict(_parts(tables))
    rest = {}
    entries = model_entries(model)
    with ranks.together():
        if ranks.is_main:
            require_space(folder, num_bytes(entries))
    for name, entry in entries.items():
        if name not in parts:
            whole: Any = entry.full_tensor() if hasattr(entry, "full_tensor") else entry
            if ranks.is_main:
                rest[name] = whole.cpu()
    files = _file_names(parts)
    with ranks.together():
        if ranks.is_main:
            model.save_pretrained(folder, state_dict=rest, max_shard_size="1000TB")
            for name, file_name in files.items():
                _begin(folder / file_name, name, parts[name])
            _index(folder, files)
    for name, file_name in files.items():
        _fill(folder / file_name, *parts[name], ranks=ranks)


def write_mapped(model: Any, folder: Path) -> None:
    """Write a model whose tables are in mapped files for `from_pretrained`, into a folder that is there.

    Files of tables are linked, not copied, where they are on the same disk: the tables must not be trained afterwards.
    """
    tables = mapped_tables(model)
    parts: dict[str, tuple[MappedTable, str]] = {}
    for path, table in tables.items():
        table.catch_up()
        for kind in ("rows", "scales") if table.scales is not None else ("rows",):
            parts[f"{path}.{kind}"] = (table, kind)
    files = _file_names(parts)
    with rows_stay_in_files():
        model.save_pretrained(folder, max_shard_size="1000TB")
    for name, (table, kind) in parts.items():
        whole = table.whole(kind)
        if not table.link(folder / files[name], kind, name):
            save_file({name: whole}, folder / files[name], metadata={"format": "pt"})
    _index(folder, files)


def _file_names(names: Collection[str]) -> dict[str, str]:
    """A file for each of these tensors, beside the one with all others."""
    count = 1 + len(names)
    return {name: f"model-{number:05d}-of-{count:05d}.safetensors" for number, name in enumerate(names, start=2)}


def _index(folder: Path, files: dict[str, str]) -> None:
    """Let a folder with a model but for these tensors say where all are."""
    for name, file_name in files.items():
        size = (folder / file_name).stat().st_size
        if size > cut.MOST_BYTES:
            warnings.warn(
                f"{name} takes {size / 1e9:,.3g} GB in one file, {file_name}, for transformers reads a tensor from "
                f"one; files of a checkpoint in shards have at most {cut.MOST_BYTES / 1e9:.3g} GB",
                PeerlmWarning,
                stacklevel=3,
            )
    first = f"model-00001-of-{1 + len(files):05d}.safetensors"
    (folder / _SINGLE).rename(folder / first)
    with safe_open(folder / first, framework="pt") as file:
        saved = list(file.keys())
    size = sum((folder / name).stat().st_size for name in (first, *files.values()))
    weights = dict.fromkeys(saved, first) | files
    write_json(folder / _INDEX, {"metadata": {"total_size": size}, "weight_map": weights})


def from_pretrained(folder: str | Path, mesh: DeviceMesh, *, dense: str = "shard") -> PeerForCausalLM:
    """A PEER language model over a mesh, with the weights of a folder that `save_pretrained` wrote, here or alone.

    Each rank reads its own part of the tables. Every rank must call it.

    Args:
        folder: the same for all ranks.
        mesh: of `peerlm.parallel.mesh`.
        dense: as of `build`.

    Raises:
        ValueError: the folder has another model, or not all of its weights, or stale rows.
    """
    folder = Path(folder)
    if (folder / INDEX).is_file():
        raise ValueError(
            f"{folder} is a checkpoint in shards, whose rows may be stale: resume its run, whose model/ is loaded"
        )
    config = PeerConfig.from_pretrained(folder)
    if getattr(config, STALE, False):
        raise ValueError(
            f"rows of {folder}, a checkpoint, are stale: load it by transformers' from_pretrained, and save it again"
        )
    model = build(config, mesh, dense=dense)
    load_pretrained(model, folder)
    return model


def load_pretrained(model: Any, folder: Path) -> None:
    """Fill a model, over a mesh or not, with the weights of a folder for `from_pretrained`, in the model's dtypes.

    Raises ValueError where the folder has weights that the model does not have, or lacks some.
    """
    files = [folder / _SINGLE]
    if (folder / _INDEX).is_file():
        names = json.loads((folder / _INDEX).read_bytes())["weight_map"].values()
        files = [folder / name for name in sorted(set(names))]
    reader, entries = SafetensorsReader.of_files(*files), model_entries(model)
    if unknown := sorted(reader.tensors.keys() - entries.keys()):
        raise ValueError(f"{folder} has {unknown[0]}, which the model does not have")
    read_shards(reader, entries, group=None, cast=True)


def _ranks() -> Ranks:
    if not dist.is_initialized():
        return ALONE
    return Ranks(rank=dist.get_rank(), world_size=dist.get_world_size(), device=torch.device("cpu"))


def _parts(tables: dict[str, ShardedTable]) -> Iterator[tuple[str, tuple[ShardedTable, Tensor]]]:
    for path, table in tables.items():
        yield f"{path}.rows", (table, raw(table.rows))
        if table.scales is not None:
            yield f"{path}.scales", (table, table.scales)


def _shape(table: ShardedTable, local: Tensor) -> list[int]:
    whole = [table.num_rows, *local.shape[1:]]
    if table.layout.cols > 1:
        whole[-1] = table.layout.width
    return whole


def _num_bytes(table: ShardedTable, local: Tensor) -> int:
    return torch.Size(_shape(table, local)).numel() * local.element_size()


def _begin(path: Path, name: str, part: tuple[ShardedTable, Tensor]) -> None:
    """Write the head of a safetensors file for one tensor, which the ranks fill."""
    head = head_of(name, _shape(*part), part[1].dtype)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + _num_bytes(*part))
        sync(path)


def _fill(path: Path, table: ShardedTable, local: Tensor, *, ranks: Ranks) -> None:
    """Write this rank's rows into the file of their tensor; all ranks raise where any cannot."""
    begin = path.stat().st_size - _num_bytes(table, local)
    failure: OSError | None = None
    blocks = _blocks(table, local) if table.place.replica.rank == 0 else ()
    with path.open("r+b", buffering=0) as file:
        for offset, rows in blocks:  # to its end, for other ranks wait for this one's columns
            try:
                if failure is None:
                    _write_at(file.fileno(), rows, begin + offset)
            except OSError as error:
                failure = error
    with ranks.together():
        if failure is not None:
            raise failure
        sync(path)


def _blocks(table: ShardedTable, local: Tensor) -> Iterator[tuple[int, Tensor]]:
    """What this rank writes: at how many bytes from the tensor's beginning, and rows with all of their columns.

    Ranks along "cols" have the same rows, and take turns to gather a block of them.
    """
    cols = table.layout.cols
    row_bytes = _num_bytes(table, local) // max(1, table.num_rows)
    at_once = max(1, _BYTES_AT_ONCE // max(1, row_bytes))
    turn = 0
    for piece in table.pieces():
        for start in range(0, piece.count, at_once):
            rows = local[piece.local + start : piece.local + min(start + at_once, piece.count)].contiguous()
            if cols > 1:
                gathered = (
                    [torch.empty_like(rows) for _ in range(cols)] if turn % cols == table.place.cols.rank else None
                )
                dist.gather(rows, gathered, group=table.place.cols.group, group_dst=turn % cols)
                rows = torch.cat(gathered, dim=-1) if gathered else rows[:0]
            turn += 1
            if len(rows):
                yield (piece.first + start) * row_bytes, rows


def _write_at(descriptor: int, values: Tensor, offset: int) -> None:
    content = memoryview(values.cpu().contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written
