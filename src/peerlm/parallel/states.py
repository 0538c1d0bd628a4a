"""A model's weights and its optimizer's state as entries of a checkpoint in shards, and back, over any mesh.

A weight or buffer has its own name, "KEY" of the optimizer's state of weight NAME is "optimizer.NAME.KEY". What several
ranks hold, as weights that are not cut, is written once.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from peerlm.ops.watched import raw
from peerlm.optim import saved
from peerlm.optim.other_kind import load_kept
from peerlm.optim.table_state import PER_ROW
from peerlm.parallel.cut import Cut, copied, cut_rows
from peerlm.parallel.storage import INDEX, Entries, SafetensorsReader, read_shards
from peerlm.parallel.table import ShardedTable, sharded_tables

_OPTIMIZER = "optimizer."


def is_spread(model: nn.Module) -> bool:
    """Whether this process may hold a part of the model alone."""
    return any(isinstance(module, ShardedTable | FSDPModule) for module in model.modules())


def model_entries(model: nn.Module) -> "dict[str, Tensor | Cut]":
    """Weights and buffers as they are, stale rows included, by name; tied weights have one.

    They share memory with the model, so that what is read into them is loaded.
    """
    _reshard(model)
    tables = {id(tensor): table for table in sharded_tables(model).values() for tensor in (table.rows, table.scales)}
    tables.pop(id(None), None)
    passing = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    tensors = dict(model.named_parameters()) | {
        name: buffer for name, buffer in model.named_buffers() if name not in passing
    }
    return {name: _laid(raw(tensor), tables.get(id(tensor))) for name, tensor in tensors.items()}


def optimizer_entries(model: nn.Module, optimizer: Optimizer) -> "tuple[dict[str, Tensor | Cut], dict[str, Any]]":
    """The optimizer's state as it is: tensors by name of their entry; what is no tensor by name of the weight and key.

    Raises ValueError for a trained parameter that is not the model's.
    """
    _reshard(model)
    names, tables = _names(model), {id(table.rows): table for table in sharded_tables(model).values()}
    tensors: dict[str, Tensor | Cut] = {}
    values: dict[str, Any] = defaultdict(dict)
    for parameter, state in optimizer.state.items():
        name = names.get(id(parameter))
        if name is None:
            raise ValueError("the optimizer trains a parameter that is not the model's, whose state has no name")
        for key, value in sorted(state.items()):
            if isinstance(value, Tensor):
                table = tables.get(id(parameter)) if key in PER_ROW else None
                tensors[f"{_OPTIMIZER}{name}.{key}"] = _laid(value, table)
            else:
                values[name][key] = value
    return tensors, dict(sorted(values.items()))


def load_states(
    model: nn.Module, optimizer: Optimizer, reader: SafetensorsReader, *, group: "dist.ProcessGroup | None"
) -> None:
    """Fill a model and its optimizer with what was saved over any mesh; each rank of the group must call it.

    Raises:
        ValueError: on every rank: what was saved is of another model, or part of it is missing.
        OSError: on every rank: a file cannot be read.
    """
    entries = model_entries(model)
    names, tables = _names(model), {id(table.rows): table for table in sharded_tables(model).values()}
    keys: dict[str, list[str]] = defaultdict(list)
    for entry in reader.tensors:
        if entry.startswith(_OPTIMIZER):
            name, _, key = entry.removeprefix(_OPTIMIZER).rpartition(".")
            keys[name].append(key)
    values = reader.values["optimizer"]
    state: dict[int, dict[str, Any]] = {}
    parameters = [parameter for group_ in optimizer.param_groups for parameter in group_["params"]]
    for index, parameter in enumerate(parameters):
        name = names[id(parameter)]
        kept: dict[str, Any] = dict(values.get(name, {}))
        for key in keys.get(name, ()):
            entry = f"{_OPTIMIZER}{name}.{key}"
            table = tables.get(id(parameter)) if key in PER_ROW else None
            kept[key] = _empty(reader, entry, parameter, table)
            entries[entry] = _laid(kept[key], table)
        if kept:
            state[index] = kept
    if unknown := sorted(reader.tensors.keys() - entries.keys()):
        raise ValueError(f"the checkpoint has {unknown[0]}, which the model and its optimizer do not have")
    read_shards(reader, entries, group=group)
    load_kept(optimizer, state)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Fill a model that is whole on this process with a checkpoint in shards; all rows are up to date afterwards.

    Raises:
        ValueError: the checkpoint is of another model, or part of it is missing.
        OSError: a file cannot be read.
    """
    reader = SafetensorsReader.of_shards(folder)
    read_shards(reader, model_entries(model), group=None)
    stale = {name: dict(kept) for name, kept in reader.values["optimizer"].items() if "history_start" in kept}
    wanted: dict[str, Tensor] = {}
    for entry, found in reader.tensors.items():
        name, _, key = entry.removeprefix(_OPTIMIZER).rpartition(".")
        if entry.startswith(_OPTIMIZER) and name in stale:
            stale[name][key] = wanted[entry] = torch.empty(found.size, dtype=found.properties.dtype)
    read_shards(reader, wanted, group=None)
    saved.catch_up_tables(model, {name: kept for name, kept in stale.items() if saved.owes_updates(kept)}, folder)


def reader_of(checkpoint: Path) -> SafetensorsReader:
    """A reader of a checkpoint's model and optimizer, be it in shards or in one file for each.

    Raises:
        ValueError: a checkpoint of an earlier version, which does not name weights; or it is damaged.
        OSError: a file cannot be read.
    """
    if (checkpoint / INDEX).is_file():
        return SafetensorsReader.of_shards(checkpoint)
    model = SafetensorsReader.of_files(checkpoint / "model.safetensors")
    numbered = SafetensorsReader.of_files(checkpoint / saved.FILE)
    values: dict[str, Any] = defaultdict(dict)
    for entry, value in saved.read_values(checkpoint).items():
        number, _, key = entry.partition(".")
        values[number][key] = value
    names = {}
    for entry in numbered.tensors:
        number, _, key = entry.partition(".")
        name = values[number].get("name")
        if name is None:
            raise ValueError(
                f"{checkpoint} is of an earlier version, which did not name the weights of its optimizer: resume it "
                "with one process, whose checkpoints name them"
            )
        names[entry] = f"{_OPTIMIZER}{name}.{key}"
    renamed = numbered.renamed(names)
    plain = {kept.pop("name"): kept for kept in values.values()}
    return SafetensorsReader(
        model.tensors | renamed.tensors, model.places | renamed.places, json.loads(json.dumps({"optimizer": plain}))
    )


def staged(entries: Entries) -> "dict[str, Tensor | Cut]":
    """Copies on the CPU of what this rank holds, to be written while training changes the originals."""
    return {name: _copied(entry) for name, entry in entries.items()}


def _reshard(model: nn.Module) -> None:
    """Give back what FSDP2 has gathered: after an evaluation a model's parameters are not those that are trained."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _copied(entry: "Tensor | Cut") -> "Tensor | Cut":
    if isinstance(entry, DTensor):
        (chunk,) = entry.__create_chunk_list__()
        entry = Cut(entry.shape, entry.dtype, [(tuple(chunk.offsets), entry.to_local())] * bool(chunk.sizes.numel()))
    return entry.copied() if isinstance(entry, Cut) else copied(entry)


def _names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


def _laid(tensor: Tensor, table: ShardedTable | None) -> "Tensor | Cut":
    if table is None:
        return tensor
    return cut_rows(tensor, table.layout, table.place.rows.rank, table.place.cols.rank)


def _empty(reader: SafetensorsReader, entry: str, parameter: Tensor, table: ShardedTable | None) -> Tensor:
    """A tensor for this rank's part of an entry of the optimizer's state of a parameter."""
    found = reader.tensors[entry]
    dtype = found.properties.dtype
    if table is not None:
        shape = list(found.size)
        shape[0] = table.layout.num_local(table.place.rows.rank)
        if len(shape) == parameter.ndim and table.layout.cols > 1:
            shape[-1] = shape[-1] * parameter.shape[-1] // table.layout.width
        return torch.zeros(shape, dtype=dtype, device=parameter.device)
    if isinstance(parameter, DTensor) and found.size == parameter.size():
        return torch.zeros_like(parameter, dtype=dtype)
    on_host = not found.size.numel() or entry.rpartition(".")[2] in ("step", "learning_rates", "log_keep")
    return torch.zeros(found.size, dtype=dtype, device="cpu" if on_host else parameter.device)
