"""What an optimizer remembers of a table as another kind of optimizer keeps it: by rows, or the table at once.

A run that resumes over other processes may update its tables otherwise than before (`optim.tables = "auto"`). Both
remember the same numbers. By rows, those of a row that has had no gradient lately are of its last one.
"""

from collections.abc import Mapping
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peerlm.ops.row_keeping import keeper_of
from peerlm.optim.row_adamw import RowAdamW
from peerlm.optim.table_state import as_of_all_rows, by_rows, row_wise_of

State = dict[str, Any]


def load_kept(optimizer: Optimizer, saved: Mapping[int, State]) -> None:
    """Load saved states, by the number of their parameter over the groups; settings stay those of the optimizer.

    Where rows wait for updates that this optimizer will not make, they are made now: parameters have been loaded.

    Raises:
        ValueError: a state does not fit the optimizer's settings.
    """
    members = [(group, parameter) for group in optimizer.param_groups for parameter in group["params"]]
    tables = count()
    kept = dict(saved)
    for index, (group, parameter) in enumerate(members):
        number = next(tables) if group.get("rows", False) else None
        state = saved.get(index)
        if not state or keeper_of(parameter) is not None:  # rows in files are updated by rows always
            continue
        if number is None and "weights_step" in state:
            catch_up_table(parameter, state)
            kept[index] = as_of_all_rows(state)
        elif number is not None and "weights_step" not in state and not group["lazy"]:
            kept[index] = by_rows(parameter, group, state) | {"number": number}
    optimizer.load_state_dict({"state": kept, "param_groups": optimizer.state_dict()["param_groups"]})


@torch.no_grad()
def catch_up_table(table: Tensor, saved: State) -> None:
    """Bring all rows up to date by a state that was saved with them."""
    # The same memory where it can be, so that no optimizer is left watching the model.
    twin = nn.Parameter(table.data.to(torch.promote_types(table.dtype, torch.float32)))
    group = {"params": [twin], "rows": True, "row_wise": row_wise_of(twin, saved["exp_avg_sq"])}
    optimizer = RowAdamW([group], betas=(saved["beta1"], saved["beta2"]), eps=saved["eps"])
    optimizer.load_state_dict({"state": {0: saved}, "param_groups": optimizer.state_dict()["param_groups"]})
    optimizer.catch_up()
    if twin.dtype != table.dtype:
        table.copy_(twin.data)
