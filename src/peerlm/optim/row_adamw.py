"""AdamW for models with tables: a step costs the rows that it touches, and the weights are those of dense AdamW."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import compress
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from peerlm.ops import api, row_updates
from peerlm.ops.padded_rows import padded_ids
from peerlm.ops.row_formats import EIGHT_BIT_DTYPES
from peerlm.ops.row_keeping import keeper_of, names_of, rows_change, stale_rows, state_changed, state_of_all
from peerlm.ops.row_shards import shard_of
from peerlm.ops.row_updates import RowState, RowStep
from peerlm.ops.watched import raw
from peerlm.optim import muon, row_step
from peerlm.optim.catch_up import RateHistory, catch_up_rules
from peerlm.optim.group_checks import check_fused, check_group, is_dtensor
from peerlm.optim.placed import Placed, capturing
from peerlm.optim.sparse_gradients import coalesced, teach_torch_sparse_norms
from peerlm.optim.table_state import (
    PER_ROW,
    State,
    history_of,
    keep_history,
    loaded_state,
    new_state,
    rates_of_decay,
)
from peerlm.ranks import ddp_group, inside_backward

_IN_DDP = "_peerlm_in_ddp"
"""Attribute of a table: whether its last look-up was within DistributedDataParallel."""
_SWEEP_EVERY = 4096
"""Steps after which all rows of a table catch up, so that the learning rates to be kept stay few."""


class RowAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov 2019) over a whole model, its tables by rows.

    Groups named "table" (those of `parameter_groups`), or with `rows=True`, hold tables (N, *row_shape): their
    gradients may be sparse COO tensors with indices (1, U) and values (U, *row_shape), coalesced or not, and only
    those rows are visited. Every other parameter is updated by torch's own AdamW. Tables of peerlm's layers in other
    groups, as of `model.parameters()`, are found: they get a group "table" with the settings of theirs. With
    `rows=False` a group keeps them as dense weights.

    By default the weights are those of `torch.optim.AdamW`. A row without a gradient would move there too, by
    momentum and by weight decay: here it catches up when it is next read. Layers say which rows they look up; code that
    reads a table's parameter in another way, copies or saves it, has all its rows brought up to date before. Decaying
    learning rates, weight decay, and changing betas and eps are all right, though a change of betas or eps costs a
    sweep over the tables.

    Args:
        params: parameters or groups.
        lr: learning rate. Each group's "lr" may change before every step. In a tensor on a GPU it stays there in lazy
            mode; exact mode reads it in each step, and so waits for the device.
        betas: decay of the moments. Exact mode needs a row left alone to come to rest soon: it refuses betas for
            which `catch_up_rules` misses its tolerance. With beta1 = 0 tables have no first moment.
        eps: added to the root of the second moment; positive in exact mode.
        weight_decay: decoupled; lr * weight_decay < 1.
        lazy: rows of tables without a gradient stay where they are and their moments do not decay, as in
            `torch.optim.SparseAdam`; rows with one also decay. It is another optimizer: in `tests/optim` its
            weights end a quarter to a half of their whole movement away from AdamW's.
        row_wise: one second moment per row of a table, the mean of the squares over the row; or a number of columns,
            as 128: one per row and so many columns of a vector.
        state_dtype: of tables' moments: float32 (float64 for float64 tables) or bfloat16.
        stochastic_rounding: whether what tables keep in bfloat16 is rounded up or down at random, right in the
            mean; to nearest, small steps would be lost.
        seed: of stochastic rounding, which is a function of seed, step, row and column.
        fused: rows of tables are updated in the backward pass, which then leaves no gradient. Each step
            must have one backward pass, at the learning rate that is set by then; tables cannot be clipped, nor be
            whole on each rank of DistributedDataParallel.

    A group named "muon", of `parameter_groups(..., muon=True)`, is updated as by `torch.optim.Muon`; it may have its
    "momentum".

    Within DistributedDataParallel gradients of tables are dense, which is what it exchanges. Where tables are sharded
    (`peerlm.parallel`) they are sparse: each rank has all there is of its rows.

    Both `clip_gradients` and torch's `clip_grad_norm_` take the sparse gradients (the latter by
    `peerlm.optim.sparse_gradients`), so that it works under transformers.Trainer as it is.

    Exact mode holds tables in float32 or float64, and so their moments; bfloat16 needs lazy=True or beta1 = 0.
    So do rows of 8 bits (`layers.table.Table.train_in_place`), which also need fused=True: they have no gradient. Their
    scales follow them, and stale ones decay by their scales, without rounding.
    Per row it keeps two int32 besides the moments. Gradients that are NaN or infinite make weights so.

    State: dense parameters have torch's "step", "exp_avg", "exp_avg_sq". Tables have these ("step" an int), in
    exact mode also "moments_step" and "weights_step", (N,) int32, and the learning rates of the steps since the
    stalest row. Saving lets all rows catch up, which changes weights within rounding: a resumed run has
    the bits of the one that saved. See `state_dict`.

    Raises:
        ValueError: for settings out of range, combinations that do not exist, and gradients of another shape.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        lazy: bool = False,
        row_wise: bool | int = False,
        state_dtype: torch.dtype = torch.float32,
        stochastic_rounding: bool = True,
        seed: int = 0,
        fused: bool = False,
        maximize: bool = False,
    ):
        if maximize:
            raise ValueError("maximize=True is not supported: negate the loss")
        teach_torch_sparse_norms()
        self._placed = Placed(_SWEEP_EVERY + 1)
        self._watcher = _Watcher(self)
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "lazy": lazy,
            "row_wise": row_wise,
            "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
            "fused": fused,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; one named "table", or with "rows" True, holds tables, which are watched from now on."""
        before = len(self.param_groups)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if "rows" not in group and group.get("name") != "table":
            self._put_tables_apart(group)
        for added in self.param_groups[before:]:
            added.setdefault("rows", added.get("name") == "table")
        try:
            for added in self.param_groups[before:]:
                check_group(added)
            self._check_exchange()
        except ValueError:
            del self.param_groups[before:]
            raise
        for added in self.param_groups[before:]:
            if added["rows"]:
                for parameter in added["params"]:
                    self._watch(parameter, added)

    def _put_tables_apart(self, group: dict[str, Any]) -> None:
        """Put the tables of this new last group that have no name into a group "table"."""
        known = row_updates.trained_rows()
        tables = [id(parameter) in known for parameter in group["params"]]
        if all(tables):
            group["name"] = "table"
        elif any(tables):
            apart = {**group, "name": "table"}
            for key in ("params", "param_names"):
                if key in group:
                    apart[key] = list(compress(group[key], tables))
                    group[key] = [each for each, is_table in zip(group[key], tables, strict=True) if not is_table]
            self.param_groups.append(apart)

    def _check_exchange(self) -> None:
        """Raise ValueError where the gradients of tables stay on their ranks."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        cut = any(is_dtensor(each) and each.device_mesh.size() > 1 for each in parameters)
        tables = [table for group in self.param_groups if group["rows"] for table in group["params"]]
        if cut and any(shard_of(table) is None for table in tables):
            raise ValueError(
                "FSDP2 does not exchange the gradients of tables that it ignores, and tables would differ from rank to "
                "rank: shard them (peerlm.parallel.parallelize), or take DistributedDataParallel or torch.optim.AdamW"
            )

    def watch(self, parameter: Tensor) -> None:
        """Watch a table that has taken the place of another in its group."""
        self._watch(parameter, self._group(parameter))

    def _watch(self, parameter: Tensor, group: dict[str, Any]) -> None:
        row_updates.watch_rows(parameter, self._watcher)
        if group["fused"] and parameter.requires_grad:  # rows of 8 bits have no gradient that would be left
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self._update_in_backward))

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; returns what the closure, run first, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group.get("name") == muon.GROUP:
                parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
                muon.muon_step(parameters, [self.state[parameter] for parameter in parameters], group)
                continue
            if not group["rows"]:
                self._step_dense(group)
                continue
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_table(parameter, group)
                elif "updated_at" in self.state.get(parameter, {}):
                    self._finish_step(parameter, group, *self.state[parameter].pop("updated_at"))
        return loss

    def _step_dense(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in parameters:
            if parameter.grad.is_sparse:
                raise ValueError(
                    f"a parameter {tuple(parameter.shape)} outside the tables has a sparse gradient: "
                    "put it in a group with rows=True"
                )
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.tensor(0.0, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                }
        for kind in (False, True):  # an operator of torch's takes no plain tensors beside those of FSDP2
            alike = [parameter for parameter in parameters if is_dtensor(parameter) == kind]
            if alike:
                _dense_step(alike, [self.state[parameter] for parameter in alike], group)

    def _step_table(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self._ready_state(parameter, group)
        table = self._table(parameter)
        ids, gradient, update = _row_gradient(parameter, _kernels(table))
        self._catch_up_rows(parameter, ids)
        rows_change(parameter, ids)
        if ids is None and _is_plain(parameter, state) and not capturing(parameter.device):
            self._age_moments(state)
            with torch._C.DisableTorchFunctionSubclass():
                # Where the parameter is, as torch's fused kernels read it there
                step = torch.full((), float(state["step"]), device=parameter.device)
                _dense_step([parameter], [{**state, "step": step}], group)
            for name in ("moments_step", "weights_step"):
                if name in state:
                    state[name].fill_(state["step"] + 1)
        else:
            update(table, ids, gradient, self._row_step(parameter, group, state["step"] + 1))
        if table.names is not None:
            parameter.grad = None  # other rows may be in its places before the next step
        self._finish_step(parameter, group, group["lr"], group["weight_decay"])

    def _finish_step(self, parameter: Tensor, group: dict[str, Any], lr: float | Tensor, weight_decay: float) -> None:
        """Count a step whose updates are made, at this learning rate and decay."""
        state = self.state[parameter]
        state["step"] += 1
        if group["lazy"]:
            return
        keep_history(state, history_of(state).append(float(lr), weight_decay))
        if state["step"] % _SWEEP_EVERY == 0 and not capturing(parameter.device):
            self._catch_up_rows(parameter, None)

    @torch.no_grad()
    def _update_in_backward(self, parameter: Tensor) -> None:
        """The hook of fused mode: update the rows, unless the backward pass did so itself, and drop their gradient."""
        if parameter.grad is None:
            return
        table, step = self._fused_update(parameter)
        ids, gradient, update = _row_gradient(parameter, _kernels(table))
        self._catch_up_rows(parameter, ids)
        rows_change(parameter, ids)
        update(table, ids, gradient, step)
        parameter.grad = None

    def _fused_update(self, parameter: Tensor) -> tuple[RowState, RowStep]:
        group = self._group(parameter)
        state = self._ready_state(parameter, group)
        if "updated_at" in state:
            raise RuntimeError(
                "fused=True updates tables in the backward pass, and this is the second one before step(): "
                "call step() after each, or accumulate gradients with fused=False"
            )
        step = self._row_step(parameter, group, state["step"] + 1)
        state["updated_at"] = step.learning_rate, step.weight_decay
        return self._table(parameter), step

    @torch.no_grad()
    def catch_up(self) -> None:
        """Bring every row of every table up to date, as before an evaluation, an export, or use by others."""
        for group in self.param_groups:
            if group["rows"]:
                for parameter in group["params"]:
                    self._catch_up_rows(parameter, None)

    def _catch_up_rows(self, parameter: Tensor, ids: Tensor | None) -> None:
        """Bring these rows, or all, up to date. ids: int64, any shape, repetitions allowed."""
        state = self.state.get(parameter)
        if not state or state.get("weights_step") is None:
            return
        now, history = state["step"], history_of(state)
        if history.start == now and not capturing(parameter.device):  # no row is behind
            return
        for part in stale_rows(parameter, now) if ids is None else [ids]:
            self._catch_up_part(parameter, part, state)
        if ids is None:
            keep_history(state, RateHistory.empty(now))

    def _catch_up_part(self, parameter: Tensor, ids: Tensor | None, state: State) -> None:
        weights_step, now, history = state["weights_step"], state["step"], history_of(state)
        table = self._table(parameter)
        kernels, group = _kernels(table), self._group(parameter)
        if hasattr(kernels, "catch_up_entries"):  # no host learns which rows are stale
            rows_change(parameter, ids)
            kernels.catch_up_entries(table, ids, *self._placed_rules(parameter, group))
        elif len(ids_U := kernels.rows_behind(table, ids, now)):
            seen = torch.zeros(now - history.start + 1, dtype=torch.bool)
            seen[weights_step[ids_U].cpu().long() - history.start] = True
            rules = catch_up_rules(history, seen.nonzero().flatten() + history.start, state["beta1"], state["beta2"])
            keeper = keeper_of(parameter)
            for part in [ids_U] if keeper is None else keeper.parts(ids_U):
                rows_change(parameter, part)
                kernels.catch_up_rows(table, part, rules, self._row_step(parameter, group, now))

    def _placed_rules(self, parameter: Tensor, group: dict[str, Any]) -> tuple[Tensor, RowStep]:
        """On a table's device: the rules by which any stale row catches up, and the numbers of the present step."""
        state, table = self.state[parameter], self._table(parameter)
        step = self._row_step(parameter, group, state["step"])
        number = next(number for number, each in enumerate(self.param_groups) if each is group)
        return self._placed.rules(_kernels(table), table, history_of(state), step, number), step

    @contextmanager
    def captured_step(self) -> Iterator[None]:
        """For the capture of a step in a CUDA graph, from the look-ups on: nothing is done, and no step is counted.

        Before it at least one step must have been made. Learning rates of other parameters than tables must be
        tensors, as torch's AdamW wants it for graphs.

        Raises:
            RuntimeError: a table's kernels take the numbers of a step from the host, and a graph would keep them; or
                tables of one group have made different numbers of steps.
        """
        for table, _ in self._trained_tables():
            if not hasattr(_kernels(self._table(table)), "place_step"):
                raise RuntimeError(
                    f"a step of a table {tuple(table.shape)} in {table.dtype} on {table.device} cannot be captured: "
                    "only the Triton kernels for tables in float32, bfloat16 or 8 bits can be replayed with others"
                )
        self._place_next_step()
        kept = ("step", "history_start", "learning_rates", "log_keep")
        before = {table: {name: self.state[table].get(name) for name in kept} for table, _ in self._trained_tables()}
        try:
            yield
        finally:
            for table, values in before.items():
                self.state[table].update({name: value for name, value in values.items() if value is not None})
                self.state[table].pop("updated_at", None)

    @contextmanager
    def replayed_step(self) -> Iterator[None]:
        """For the replay of a captured step: it is the next step, at the learning rates that are set by now."""
        self._place_next_step()
        yield
        for table, group in self._trained_tables():
            self._finish_step(table, group, group["lr"], group["weight_decay"])

    def _trained_tables(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """The tables that have made a step, and their groups."""
        return [
            (p, group) for group in self.param_groups if group["rows"] for p in group["params"] if self.state.get(p)
        ]

    def _place_next_step(self) -> None:
        """Place what the kernels of the next step read, for all tables."""
        tables = self._trained_tables()
        for group in self.param_groups:  # whose tables share one tensor of rules
            states = [self.state[table] for table, each in tables if each is group and not group["lazy"]]
            if len({state["step"] for state in states}) > 1:
                raise RuntimeError(
                    "tables of one group have made different numbers of steps, and their steps cannot be captured "
                    "together: give these tables groups of their own"
                )
            if len({state["history_start"] for state in states}) > 1:
                self.catch_up()
        for table, group in tables:
            self._ready_state(table, group)
            self._row_step(table, group, self.state[table]["step"] + 1)
            if not group["lazy"]:
                self._placed_rules(table, group)

    def _group(self, parameter: Tensor) -> dict[str, Any]:
        return next(group for group in self.param_groups if any(member is parameter for member in group["params"]))

    def _table(self, parameter: Tensor) -> RowState:
        state = self.state[parameter]
        return RowState(
            rows=raw(parameter),  # rows that autograd has saved do not change
            exp_avg=state.get("exp_avg"),
            exp_avg_sq=state["exp_avg_sq"],
            moments_step=state.get("moments_step"),
            weights_step=state.get("weights_step"),
            shard=shard_of(parameter),
            names=names_of(parameter),
            scales=_scales_of(parameter),
        )

    def _row_step(self, parameter: Tensor, group: dict[str, Any], number: int) -> RowStep:
        """The numbers of step `number`: the next one, to be made, or the present one, up to which rows catch up."""
        state, table = self.state[parameter], self._table(parameter)
        kernels = _kernels(table)
        stays = hasattr(kernels, "place_step") and group["lazy"]
        step = RowStep(
            step=number,
            learning_rate=group["lr"] if stays else float(group["lr"]),
            weight_decay=group["weight_decay"],
            beta1=state["beta1"],
            beta2=state["beta2"],
            eps=state["eps"],
            seed=group["seed"] + state["number"] if group["stochastic_rounding"] else None,
        )
        return self._placed.step(kernels, table, step, state["number"], number - state["step"])

    def _ready_state(self, parameter: Tensor, group: dict[str, Any]) -> State:
        """The state of a table, made when first needed; a change of betas or eps sets in here."""
        check_group(group, wait=False)
        state: State = self.state[parameter]
        if not state:
            state.update(new_state(parameter, group))
            tables = [p for g in self.param_groups if g["rows"] for p in g["params"]]
            state["number"] = next(number for number, table in enumerate(tables) if table is parameter)
        now = rates_of_decay(group)
        if any(state[name] != value for name, value in now.items()):
            if (now["beta1"] == 0) != (state["beta1"] == 0):
                raise ValueError(f"beta1 cannot change from {state['beta1']} to {now['beta1']} during training")
            self._catch_up_rows(parameter, None)
            rows_change(parameter, None)
            self._age_moments(state_of_all(parameter, state, PER_ROW))
            state_changed(parameter, [name for name in PER_ROW if name in state])
            state.update(now)
        return state

    def _age_moments(self, state: State) -> None:
        """Let moments decay up to the present step, so that other betas can take over."""
        if state.get("moments_step") is None:
            return
        missed_N = (state["step"] - state["moments_step"]).double()
        for name, beta in (("exp_avg", state["beta1"]), ("exp_avg_sq", state["beta2"])):
            if name in state:
                decay_N = (beta**missed_N).to(torch.promote_types(state[name].dtype, torch.float32))
                state[name].mul_(decay_N.view(-1, *[1] * (state[name].ndim - 1)))
        state["moments_step"].fill_(state["step"])

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`, after all rows have caught up.

        So the state goes with rows that are saved before or after. Within `ops.row_updates.rows_as_they_are` nothing
        catches up: then the state goes with rows that are saved in there too.
        """
        self._catch_up_to_be_saved()
        saved = super().state_dict()
        for group, packed in zip(self.param_groups, saved["param_groups"], strict=True):
            for parameter, number in zip(group["params"], packed["params"], strict=True):
                if number in saved["state"]:
                    saved["state"][number] = state_of_all(parameter, saved["state"][number], PER_ROW)
        return saved

    def __getstate__(self) -> dict[str, Any]:
        if any(names_of(parameter) is not None for group in self.param_groups for parameter in group["params"]):
            raise ValueError("an optimizer of tables with a cache on a device is not copied: save its state_dict()")
        self._catch_up_to_be_saved()
        return super().__getstate__()

    def _catch_up_to_be_saved(self) -> None:
        if row_updates.rows_may_catch_up():
            self.catch_up()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` gave; tables' state keeps its dtypes. Raises ValueError where it does not fit."""
        tables: dict[int, Tensor] = {}
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            if group["rows"]:
                tables.update(zip(saved["params"], group["params"], strict=False))
        dense = {key: value for key, value in state_dict["state"].items() if key not in tables}
        fused = [group["fused"] for group in self.param_groups]
        super().load_state_dict({**state_dict, "state": dense})
        for group, ours in zip(self.param_groups, fused, strict=True):
            group["fused"] = ours  # how steps are made, not what has been learned
        for parameter in (p for group in self.param_groups if not group["rows"] for p in group["params"]):
            if "step" in (state := self.state.get(parameter, {})):  # torch leaves it on the CPU
                state["step"] = state["step"].to(parameter.device, torch.float32)
        for key, parameter in tables.items():
            saved_state = state_dict["state"].get(key)
            if saved_state:
                self.state[parameter] = loaded_state(parameter, self._group(parameter), saved_state)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_watcher" not in self.__dict__:  # a copy, or unpickled
            self._placed = Placed(_SWEEP_EVERY + 1)
            self._watcher, self._hooks = _Watcher(self), []
            for group in self.param_groups:
                if group["rows"]:
                    for parameter in group["params"]:
                        self._watch(parameter, group)


class _Watcher:
    """What stands at a table in place of its optimizer."""

    def __init__(self, optimizer: RowAdamW):
        self.optimizer = optimizer

    @torch.no_grad()
    def before_read(self, parameter: Tensor, ids: Tensor | None) -> None:
        self.optimizer._catch_up_rows(parameter, ids)

    def takes_row_gradients(self, parameter: Tensor) -> bool:
        """Not within DistributedDataParallel, which exchanges dense gradients of tables that each rank has whole."""
        if shard_of(parameter) is not None:
            return True
        if not inside_backward():
            setattr(parameter, _IN_DDP, ddp_group() is not None)
        within = getattr(parameter, _IN_DDP, False)
        if torch.is_grad_enabled() and self.optimizer._group(parameter)["fused"]:
            check_fused(within)
        return not within

    def fused_update(self, parameter: Tensor) -> tuple[RowState, RowStep] | None:
        if not self.optimizer._group(parameter)["fused"]:
            return None
        return self.optimizer._fused_update(parameter)

    def release(self, parameter: Tensor) -> None:
        self.before_read(parameter, None)
        for hook in self.optimizer._hooks:
            hook.remove()


def _scales_of(parameter: Tensor) -> Tensor | None:
    """The scales of rows of 8 bits, to be changed without a trace in autograd."""
    scales = row_updates.scales_of(parameter)
    if scales is None and parameter.dtype in EIGHT_BIT_DTYPES:
        raise ValueError(f"rows in {parameter.dtype} need scales, and no table of peerlm's layers has this parameter")
    return None if scales is None else scales.data


def _dense_step(parameters: list[Tensor], states: list[State], group: dict[str, Any]) -> None:
    """AdamW of torch itself on whole tensors; each state has "step", "exp_avg" and "exp_avg_sq"."""
    beta1, beta2 = group["betas"]
    adamw(
        parameters,
        [parameter.grad for parameter in parameters if parameter.grad is not None],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters),
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _is_plain(parameter: Tensor, state: State) -> bool:
    """Whether the table's state is what torch's AdamW keeps of a dense parameter."""
    same = all(name in state and state[name].shape == parameter.shape for name in ("exp_avg", "exp_avg_sq"))
    return same and parameter.dtype == state["exp_avg"].dtype == state["exp_avg_sq"].dtype != torch.bfloat16


def _kernels(table: RowState) -> Any:
    """The module whose `update_rows` and `catch_up_rows` work on this table."""
    return api.row_kernels(table) or row_step


def _row_gradient(parameter: Tensor, kernels: Any) -> tuple[Tensor | None, Tensor, Callable[..., None]]:
    """Row numbers (U,), None for all rows in order; their gradients (U, *row_shape); what updates the rows by these.

    Row numbers are distinct, unless the kernels add up the gradients of each row as they go; -1, which these kernels
    leave out, is padding.
    """
    gradient = parameter.grad
    assert gradient is not None
    if not gradient.is_sparse:
        return None, gradient, kernels.update_rows
    if gradient.sparse_dim() != 1:
        raise ValueError(
            f"the sparse gradient of a table {tuple(parameter.shape)} has {gradient.sparse_dim()} sparse dimensions: "
            "give indices (1, U) and values (U, *row_shape)"
        )
    if not gradient.is_coalesced() and hasattr(kernels, "update_entries"):
        padded = padded_ids(parameter)
        if padded is not None:
            return padded, gradient._values(), kernels.update_rows
        return gradient._indices()[0], gradient._values(), kernels.update_entries
    gradient = coalesced(gradient)
    return gradient.indices()[0], gradient.values(), kernels.update_rows
