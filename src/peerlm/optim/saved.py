"""The state of an optimizer in a file beside its model, and the updates that it still owes that model's rows."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from peerlm.optim.groups import parameter_groups
from peerlm.optim.row_adamw import RowAdamW

FILE = "optimizer.safetensors"
"""Entry KEY of the state of parameter number INDEX is "INDEX.KEY"; what is no tensor is in the metadata as JSON."""

State = dict[int, dict[str, Any]]
"""What an optimizer remembers, by the number of the parameter over its groups."""


def save_state(optimizer: Optimizer, folder: Path) -> None:
    """Write the state into a folder; rows catch up first, but within `ops.row_updates.rows_as_they_are`."""
    state: State = optimizer.state_dict()["state"]
    flat = {f"{index}.{key}": value for index, entries in state.items() for key, value in entries.items()}
    tensors = {name: value.contiguous() for name, value in flat.items() if isinstance(value, Tensor)}
    values = {name: value for name, value in flat.items() if name not in tensors}
    save_file(tensors, folder / FILE, metadata={"values": json.dumps(values)})


def load_state(optimizer: Optimizer, folder: Path) -> None:
    """Load what `save_state` wrote; settings stay those of the optimizer."""
    optimizer.load_state_dict({"state": read_state(folder), "param_groups": optimizer.state_dict()["param_groups"]})


def read_state(folder: Path) -> State:
    """What `save_state` wrote."""
    with safe_open(folder / FILE, framework="pt") as file:
        values = json.loads((file.metadata() or {}).get("values", "{}"))
        flat = {name: file.get_tensor(name) for name in file.keys()} | values  # noqa: SIM118, no mapping
    state: State = {}
    for name, value in flat.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    return state


def catch_up_saved(model: nn.Module, folder: Path) -> None:
    """Bring rows of a model's tables up to date that were stale when it was saved, beside its optimizer's state.

    Does nothing where there is no such state, or no row is stale. model: as it was loaded from `folder`, all
    parameters trainable.

    Raises:
        ValueError: the state is of another model.
    """
    if not (folder / FILE).is_file():
        return
    state = read_state(folder)
    members = [(group["name"], parameter) for group in parameter_groups(model) for parameter in group["params"]]
    for index, saved in state.items():
        if saved.get("weights_step") is None or saved["history_start"] == saved["step"]:
            continue
        name, table = members[index] if index < len(members) else ("", None)
        if table is None or name != "table":
            raise ValueError(f"{folder / FILE} has the state of a table as parameter {index}, which the model has not")
        twin = nn.Parameter(table.data)  # the same memory, so that no optimizer is left watching the model
        optimizer = RowAdamW(
            [{"params": [twin], "name": "table"}], betas=(saved["beta1"], saved["beta2"]), eps=saved["eps"]
        )
        optimizer.load_state_dict({"state": {0: saved}, "param_groups": optimizer.state_dict()["param_groups"]})
        optimizer.catch_up()
