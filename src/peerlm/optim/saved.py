"""The state of an optimizer in a file beside its model, and the updates that the model's stale rows still need."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from peerlm.files import write_json
from peerlm.ops.row_keeping import keeper_of, rows_stay
from peerlm.ops.row_updates import scales_of
from peerlm.optim.other_kind import catch_up_table, load_kept
from peerlm.optim.table_state import PER_ROW

STALE = "stale_rows"
"""The field of a saved model's configuration that says so."""
FILE = "optimizer.safetensors"
"""Entry KEY of the state of parameter number INDEX is "INDEX.KEY"; what is no tensor is in the metadata as JSON.

So is, as KEY "name", the name that the parameter has in the model. The metadata has one entry, since safetensors writes
several in any order.
"""
_NAME = "name"
TABLES = "tables.json"
"""A file of a checkpoint whose tables, with what the optimizer keeps of their rows, are in files elsewhere."""

State = dict[int, dict[str, Any]]
"""What an optimizer remembers, by the number of the parameter over its groups."""


def save_state(optimizer: Optimizer, folder: Path, model: nn.Module) -> bool:
    """Write the state into a folder; rows catch up first, but within `ops.row_updates.rows_as_they_are`.

    model: whose parameters the optimizer has. Returns whether the state owes updates to rows of it.
    """
    path_of = {id(parameter): path for path, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: State = {
        index: {**_of_checkpoint(entries, parameters[index]), _NAME: path_of.get(id(parameters[index]))}
        for index, entries in sorted(optimizer.state_dict()["state"].items())
    }
    flat = {f"{index}.{key}": value for index, entries in state.items() for key, value in entries.items()}
    tensors = {name: value.contiguous() for name, value in flat.items() if isinstance(value, Tensor)}
    values = {name: value for name, value in flat.items() if name not in tensors}
    save_file(tensors, folder / FILE, metadata={"values": json.dumps(values)})
    return any(owes_updates(entries) for entries in optimizer.state_dict()["state"].values())


def _of_checkpoint(entries: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    """What a checkpoint has of a parameter's state: not what stays in files."""
    stays = rows_stay() and keeper_of(parameter) is not None
    return {name: value for name, value in entries.items() if not (stays and name in PER_ROW)}


def load_state(optimizer: Optimizer, folder: Path) -> None:
    """Load what `save_state` wrote, whichever kind of optimizer it was of; settings stay those of the optimizer.

    The model's parameters have been loaded before: rows that this optimizer would leave stale are brought up to date.
    """
    state = read_state(folder)
    for entries in state.values():
        entries.pop(_NAME, None)
    load_kept(optimizer, state)


def read_state(folder: Path) -> State:
    """What `save_state` wrote."""
    with safe_open(folder / FILE, framework="pt") as file:
        flat = {name: file.get_tensor(name) for name in file.keys()} | read_values(folder)  # noqa: SIM118, no mapping
    state: State = {}
    for name, value in flat.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    return state


def read_values(folder: Path) -> dict[str, Any]:
    """What `save_state` wrote that is no tensor, by "INDEX.KEY"."""
    with safe_open(folder / FILE, framework="pt") as file:
        values: dict[str, Any] = json.loads((file.metadata() or {}).get("values", "{}"))
    return values


def catch_up_saved(model: nn.Module, folder: Path, prefix: str = "") -> None:
    """Bring rows of a model's tables up to date that were stale when it was saved, beside its optimizer's state.

    Args:
        model: as it was loaded from `folder`, in any dtype.
        folder: what `save_state` wrote into.
        prefix: what the names of one of both models, the saved one and this, have before those of the other.

    Raises:
        ValueError: the state is of another model, or of an earlier version of peerlm, or rows are not in memory.
    """
    states = {}
    for saved in read_state(folder).values():
        if not owes_updates(saved):
            continue
        name = saved.get(_NAME)
        if name is None:
            raise ValueError(
                f"{folder / FILE}, of another version of peerlm, does not name the tables whose rows are stale: "
                "resume its run, which saves them again"
            )
        states[name] = saved
    catch_up_tables(model, states, folder, prefix)


def catch_up_tables(model: nn.Module, states: Mapping[str, dict[str, Any]], folder: Path, prefix: str = "") -> None:
    """As `catch_up_saved`, by states of tables that owe updates, by the names of these in the saved model."""
    parameters = dict(model.named_parameters())
    for name, saved in states.items():
        known_as = (name, name.removeprefix(prefix), prefix + name)
        table = next((parameters[each] for each in known_as if each in parameters), None)
        if table is None:
            raise ValueError(f"{folder} has the state of a table {name}, which the model does not have")
        if table.is_meta:
            raise ValueError(f"rows of {name} are stale in {folder}, and cannot be updated on a disk: load them whole")
        scales = scales_of(table)
        if scales is None:
            catch_up_table(table, saved)
        else:  # without momentum: rows decay, as their scales do
            catch_up_table(scales, {**saved, "exp_avg_sq": torch.zeros(len(scales))})


def mark_stale(folder: Path) -> None:
    """Note in a saved model's configuration that its rows are stale without the state beside it."""
    path = folder / "config.json"
    if path.is_file():
        write_json(path, json.loads(path.read_text(encoding="utf-8")) | {STALE: True})


def owes_updates(saved: dict[str, Any]) -> bool:
    """Whether rows of the table of this state are stale."""
    return saved.get("weights_step") is not None and saved["history_start"] != saved["step"]
