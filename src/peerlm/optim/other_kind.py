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


def as_kept_by(optimizer: Optimizer, saved: Mapping[int, State]) -> dict[int, State]:
    """Saved states, by the number of their parameter over the groups, as this optimizer keeps them.

    Where rows wait for updates that this optimizer will not make, they are made now: parameters have been loaded.
    """
    members = [(group, parameter) for group in optimizer.param_groups for parameter in group["params"]]
    tables = count()
    kept = {}
    for index, (group, parameter) in enumerate(members):
        is_table = group.get("rows", False)
        number = next(tables) if is_table else None
        state = saved.get(index, {})
        elsewhere = keeper_of(parameter) is not None  # what is kept of its rows, which is by rows always
        if is_table and not elsewhere and not group["lazy"] and "step" in state and "weights_step" not in state:
            state = by_rows(parameter, group, state) | {"number": number}
        elif not is_table and "weights_step" in state:
            catch_up_table(parameter, state)
            state = as_of_all_rows(state)
        if state:
            kept[index] = state
    return kept


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
