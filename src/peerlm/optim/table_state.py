"""What RowAdamW remembers of a table: made, checked against what was saved, and its learning rates of late steps."""

from typing import Any

import torch
from torch import Tensor

from peerlm.ops.row_keeping import keeper_of, new_row_state, rows_of_table, rows_stay
from peerlm.optim.catch_up import RateHistory
from peerlm.optim.row_step import arithmetic_dtype

State = dict[str, Any]
PER_ROW = ("exp_avg", "exp_avg_sq", "moments_step", "weights_step")
"""What the state has of each row: the first size of these tensors is the table's."""


def rates_of_decay(group: dict[str, Any]) -> dict[str, float]:
    """What a table's state belongs to; a change costs a sweep."""
    return {"beta1": group["betas"][0], "beta2": group["betas"][1], "eps": group["eps"]}


def second_moments(parameter: Tensor, row_wise: bool | int) -> tuple[int, ...]:
    """The shape of the second moments of a table (N, *X, D): one per row, or one per `row_wise` columns of a vector.

    Raises ValueError where that many columns do not divide D.
    """
    if row_wise is True:
        return (len(parameter),)
    *vectors, width = parameter.shape
    if width % row_wise:
        raise ValueError(
            f"row_wise = {row_wise}: a table {tuple(parameter.shape)} has {width} columns, which {row_wise} does not "
            "divide; choose another number, or True for one second moment per row"
        )
    return (*vectors, width // row_wise)


def row_wise_of(parameter: Tensor, exp_avg_sq: Tensor) -> bool | int:
    """The setting by which a table's second moments have this shape."""
    if exp_avg_sq.shape == parameter.shape:
        return False
    return True if exp_avg_sq.ndim == 1 else parameter.shape[-1] // exp_avg_sq.shape[-1]


def new_state(parameter: Tensor, group: dict[str, Any]) -> State:
    """Empty moments and steps, as the settings of the group ask for."""
    dtype = arithmetic_dtype(parameter)
    state_dtype = torch.bfloat16 if group["state_dtype"] == torch.bfloat16 else dtype
    state: State = {"step": 0, **rates_of_decay(group)}
    if group["betas"][0] > 0:
        state["exp_avg"] = new_row_state(parameter, "exp_avg", parameter.shape, state_dtype)
    if group["row_wise"]:
        shape = second_moments(parameter, group["row_wise"])
        state["exp_avg_sq"] = new_row_state(parameter, "exp_avg_sq", shape, dtype)
    else:
        state["exp_avg_sq"] = new_row_state(parameter, "exp_avg_sq", parameter.shape, state_dtype)
    if not group["lazy"]:
        for name in ("moments_step", "weights_step"):
            state[name] = new_row_state(parameter, name, parameter.shape[:1], torch.int32)
        keep_history(state, RateHistory.empty(0))
    return state


def by_rows(parameter: Tensor, group: dict[str, Any], saved: State) -> State:
    """The state of an AdamW that updates the whole table as one that does so by rows, all of which are up to date."""
    step = int(saved["step"])
    state = new_state(parameter, group) | {"step": step}
    state |= {name: saved[name] for name in ("exp_avg", "exp_avg_sq") if name in state}
    for name in ("moments_step", "weights_step"):
        state[name].fill_(step)
    keep_history(state, RateHistory.empty(step))
    return state


def as_of_all_rows(saved: State) -> State:
    """The state of an AdamW by rows as one that updates the whole table: moments have decayed in steps without one."""
    missed = (saved["step"] - saved["moments_step"]).double()
    moments = {}
    for name, beta in (("exp_avg", saved["beta1"]), ("exp_avg_sq", saved["beta2"])):
        if name in saved:
            decay = (beta**missed).to(saved[name])
            moments[name] = saved[name] * decay.view(-1, *[1] * (saved[name].ndim - 1))
    return {"step": torch.tensor(float(saved["step"])), **moments}


def loaded_state(parameter: Tensor, group: dict[str, Any], saved: State) -> State:
    """What was saved of a table, on its device; raises ValueError where it does not fit the group's settings."""
    size = (rows_of_table(parameter), *parameter.shape[1:])
    expected = new_state(torch.empty(size, dtype=parameter.dtype, device="meta"), group)
    keeper = keeper_of(parameter)
    if keeper is not None and rows_stay():
        kept = {name: keeper.kept_state(name) for name in PER_ROW if name in expected}
        saved = saved | {name: value for name, value in kept.items() if value is not None}
    for name, value in expected.items():
        if name not in saved and not isinstance(value, Tensor):
            raise ValueError(f"the saved state of a table lacks {name!r}: another version of peerlm has written it")
        if isinstance(value, Tensor) and name not in ("learning_rates", "log_keep"):
            found = saved.get(name)
            if found is None or found.shape != value.shape:
                shape = None if found is None else tuple(found.shape)
                raise ValueError(f"the saved {name!r} of a table has shape {shape}, not {tuple(value.shape)}")
    on_cpu = ("learning_rates", "log_keep")
    if keeper is not None:
        names = [name for name in PER_ROW if name in saved]
        for name in names if not rows_stay() else ():
            keeper.put_state(name, saved[name])
        saved = saved | {name: keeper.state_here(name) for name in names}
    return {
        name: value.to(parameter.device) if isinstance(value, Tensor) and name not in on_cpu else value
        for name, value in saved.items()
    }


def history_of(state: State) -> RateHistory:
    """The learning rates of the steps since all rows were up to date."""
    return RateHistory(state["history_start"], state["learning_rates"], state["log_keep"])


def keep_history(state: State, history: RateHistory) -> None:
    """Put these learning rates in the place of those that the state has."""
    state["history_start"] = history.start
    state["learning_rates"] = history.learning_rates
    state["log_keep"] = history.log_keep
