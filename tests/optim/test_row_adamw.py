"""RowAdamW against torch.optim.AdamW: a table whose rows are drawn by Zipf's law, and models around tables."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from peerlm.ops.row_updates import (
    fused_row_update,
    look_up,
    prepare_rows,
    rows_as_they_are,
    wants_row_gradients,
)
from peerlm.optim import RowAdamW, clip_gradients, parameter_groups
from peerlm.optim.catch_up import TOLERANCE

ROWS, ROW_SHAPE, STEPS = 48, (2, 6), 600
REGIMES = {
    "normal gradients": (1.0, 0.999),
    "beta2 = .95": (1.0, 0.95),
    "gradients ~ 1e-6": (1e-6, 0.999),
    "gradients ~ eps": (1e-8, 0.999),
    "gradients ~ eps, beta2 = .95": (1e-8, 0.95),
}
"""Scale of the gradients, and beta2."""


def start(dtype: torch.dtype) -> nn.Parameter:
    generator = torch.Generator().manual_seed(1)
    return nn.Parameter((0.1 * torch.randn(ROWS, *ROW_SHAPE, generator=generator, dtype=torch.float64)).to(dtype))


def batches(steps: int = STEPS, reads: int = 12) -> list[tuple[Tensor, Tensor]]:
    """Each step's rows (U,), distinct and ascending, and a noise for their gradients (U, *ROW_SHAPE)."""
    generator = torch.Generator().manual_seed(2)
    shares = 1 / torch.arange(1, ROWS + 1, dtype=torch.float64)
    drawn = [torch.multinomial(shares, reads, replacement=True, generator=generator).unique() for _ in range(steps)]
    return [(ids, torch.randn(len(ids), *ROW_SHAPE, generator=generator, dtype=torch.float64)) for ids in drawn]


def rate(step: int, steps: int = STEPS, peak: float = 1e-2) -> float:
    return peak * 0.5 * (1 + math.cos(math.pi * step / steps))


def gradient_of(rows: Tensor, noise: Tensor, scale: float) -> Tensor:
    """Depends on the weights, so that a row that is read before it caught up shows."""
    return scale * (noise + 2 * rows.double()).to(rows.dtype)


def train(
    table: nn.Parameter,
    optimizer: torch.optim.Optimizer,
    scale: float,
    *,
    sparse: bool,
    steps: range = range(STEPS),
    after_step: Callable[[int], None] = lambda step: None,
) -> None:
    drawn = batches()
    for step in steps:
        ids, noise = drawn[step]
        optimizer.param_groups[0]["lr"] = rate(step)
        gradient = gradient_of(read(table, ids), noise, scale)
        table.grad = sparse_gradient(table, ids, gradient) if sparse else dense_gradient(table, ids, gradient)
        optimizer.step()
        after_step(step)


def read(table: Tensor, ids: Tensor) -> Tensor:
    return look_up(table, ids, lambda rows, row_gradients: rows.detach()[ids])


def as_it_is(table: Tensor) -> Tensor:
    """A copy of rows as they are stored, behind or not."""
    with rows_as_they_are():
        return table.detach().clone()


def dense_gradient(table: Tensor, ids: Tensor, gradient: Tensor) -> Tensor:
    return torch.zeros_like(table).index_copy(0, ids, gradient)


def sparse_gradient(table: Tensor, ids: Tensor, gradient: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(ids[None], gradient, table.shape, is_coalesced=True, check_invariants=True)


def difference(found: Tensor, expected: Tensor, first: Tensor) -> float:
    """Distance of two outcomes, relative to the whole movement of the weights."""
    moved = (expected.double() - first.double()).norm()
    return ((found.double() - expected.double()).norm() / moved).item()


def by_rows(table: nn.Parameter, **settings: Any) -> RowAdamW:
    return RowAdamW([{"params": [table], "rows": True}], **settings)


SETTINGS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}


def dense_outcome(scale: float, beta2: float, dtype: torch.dtype = torch.float64) -> Tensor:
    table = start(dtype)
    train(table, torch.optim.AdamW([table], betas=(0.9, beta2), **SETTINGS), scale, sparse=False)
    return table.detach()


@pytest.mark.parametrize("regime", REGIMES)
def test_weights_are_those_of_dense_adamw(regime: str) -> None:
    scale, beta2 = REGIMES[regime]
    expected, first = dense_outcome(scale, beta2), start(torch.float64).detach()
    errors = {}
    for dtype in (torch.float64, torch.float32):
        table = start(dtype)
        optimizer = by_rows(table, betas=(0.9, beta2), **SETTINGS)
        train(table, optimizer, scale, sparse=True)
        assert difference(as_it_is(table), expected, first) > 1e-4  # many rows are behind
        optimizer.catch_up()
        errors[dtype] = difference(table.detach(), expected, first)
    assert errors[torch.float64] < TOLERANCE
    plain = difference(dense_outcome(scale, beta2, torch.float32), expected, first)
    assert errors[torch.float32] < 2 * plain + TOLERANCE


def short_outcome(
    optimizer_of: Callable[[nn.Parameter], torch.optim.Optimizer], *, sparse: bool, **options: Any
) -> Tensor:
    table = start(torch.float64)
    optimizer = optimizer_of(table)
    train(table, optimizer, 1.0, sparse=sparse, steps=range(60), **options)
    if isinstance(optimizer, RowAdamW):
        optimizer.catch_up()
    return table.detach()


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_any_momentum_and_decay(beta1: float, weight_decay: float) -> None:
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (beta1, 0.99), "weight_decay": weight_decay}
    expected = short_outcome(lambda table: torch.optim.AdamW([table], **settings), sparse=False)
    found = short_outcome(lambda table: by_rows(table, **settings), sparse=True)
    assert difference(found, expected, start(torch.float64).detach()) < TOLERANCE


def test_dense_gradients_of_tables_and_mixtures_with_sparse_ones() -> None:
    expected = short_outcome(lambda table: torch.optim.AdamW([table], **SETTINGS), sparse=False)
    assert (
        difference(
            short_outcome(lambda table: by_rows(table, **SETTINGS), sparse=False), expected, start(torch.float64)
        )
        < 1e-12
    )
    table = start(torch.float64)
    optimizer = by_rows(table, **SETTINGS)
    for step in range(60):
        train(table, optimizer, 1.0, sparse=step % 7 != 3, steps=range(step, step + 1))
    optimizer.catch_up()
    assert difference(table.detach(), expected, start(torch.float64)) < TOLERANCE


def test_dense_gradients_of_tables_have_the_bits_of_fused_adamw() -> None:
    tables = start(torch.float32), start(torch.float32)
    train(tables[0], by_rows(tables[0], **SETTINGS), 1.0, sparse=False, steps=range(10))
    train(tables[1], torch.optim.AdamW([tables[1]], fused=True, **SETTINGS), 1.0, sparse=False, steps=range(10))
    assert torch.equal(*tables)


def test_rows_with_gradients_that_nobody_prepared_catch_up_in_step() -> None:
    """Another rank's rows, after gradients were exchanged."""

    def run(optimizer_of: Callable[[nn.Parameter], torch.optim.Optimizer]) -> Tensor:
        table = start(torch.float64)
        optimizer = optimizer_of(table)
        for ids, noise in batches(60):
            table.grad = sparse_gradient(table, ids, noise)
            if not isinstance(optimizer, RowAdamW):
                table.grad = table.grad.to_dense()
            optimizer.step()
        prepare_rows(table, None)
        return table.detach()

    expected, found = run(lambda t: torch.optim.AdamW([t], **SETTINGS)), run(lambda t: by_rows(t, **SETTINGS))
    assert difference(found, expected, start(torch.float64)) < TOLERANCE


def test_reading_more_often_or_less_changes_nothing_but_rounding() -> None:
    def read_some(table: nn.Parameter) -> Callable[[int], None]:
        return lambda step: prepare_rows(table, torch.arange(step % ROWS, ROWS, 3) if step % 5 else None)

    expected = short_outcome(lambda table: torch.optim.AdamW([table], **SETTINGS), sparse=False)
    table = start(torch.float64)
    train(table, by_rows(table, **SETTINGS), 1.0, sparse=True, steps=range(60), after_step=read_some(table))
    prepare_rows(table, None)
    assert difference(table.detach(), expected, start(torch.float64)) < TOLERANCE


@given(
    st.lists(st.sets(st.integers(0, 4), max_size=5), min_size=1, max_size=25),
    st.sampled_from([(0.9, 0.999), (0.9, 0.95), (0.0, 0.9), (0.5, 0.8)]),
    st.sampled_from([0.0, 0.3]),
)
def test_any_order_of_touches(touched: list[set[int]], betas: tuple[float, float], weight_decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    dense, rows = nn.Parameter(first.clone()), nn.Parameter(first.clone())
    settings: dict[str, Any] = {"betas": betas, "weight_decay": weight_decay, "eps": 1e-3}
    optimizers = [torch.optim.AdamW([dense], **settings), by_rows(rows, **settings)]
    for number, ids in enumerate(touched):
        at = torch.tensor(sorted(ids), dtype=torch.int64)
        gradient = torch.randn(len(at), 3, dtype=torch.float64, generator=generator)
        dense.grad, rows.grad = dense_gradient(dense, at, gradient), sparse_gradient(rows, at, gradient)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.01 * (1 + number % 3)
            optimizer.step()
    prepare_rows(rows, None)
    torch.testing.assert_close(rows.detach(), dense.detach(), rtol=0, atol=2 * TOLERANCE * 0.03 * len(touched))


def test_steps_without_a_gradient_do_not_count() -> None:
    table, other = start(torch.float64), start(torch.float64)
    rows, dense = by_rows(table, **SETTINGS), torch.optim.AdamW([other], **SETTINGS)
    for step, (ids, noise) in enumerate(batches(30)):
        table.grad = sparse_gradient(table, ids, noise) if step % 3 else None
        other.grad = dense_gradient(other, ids, noise) if step % 3 else None
        rows.step()
        dense.step()
    rows.catch_up()
    assert difference(table.detach(), other.detach(), start(torch.float64)) < TOLERANCE


def test_betas_and_eps_may_change_on_the_way() -> None:
    def change(optimizer: torch.optim.Optimizer) -> Callable[[int], None]:
        def after(step: int) -> None:
            if step in (20, 40):
                optimizer.param_groups[0].update(betas=(0.8, 0.9), eps=1e-4) if step == 20 else None
                optimizer.param_groups[0].update(betas=(0.95, 0.999)) if step == 40 else None

        return after

    outcomes = []
    for make, sparse in (
        (lambda t: torch.optim.AdamW([t], **SETTINGS), False),
        (lambda t: by_rows(t, **SETTINGS), True),
    ):
        table = start(torch.float64)
        optimizer = make(table)
        train(table, optimizer, 1.0, sparse=sparse, steps=range(60), after_step=change(optimizer))
        prepare_rows(table, None)
        outcomes.append(table.detach())
    assert difference(outcomes[1], outcomes[0], start(torch.float64)) < TOLERANCE


def test_lazy_mode_is_sparse_adam_with_decay_of_the_rows_touched() -> None:
    def sparse_adam(decay: float) -> tuple[Tensor, Tensor]:
        ours, theirs = start(torch.float64), start(torch.float64)
        # SparseAdam adds eps before it corrects the second moment's bias
        rows = by_rows(ours, lr=1e-2, weight_decay=decay, lazy=True, eps=1e-15)
        adam = torch.optim.SparseAdam([theirs], lr=1e-2, eps=1e-15)
        for step, (ids, noise) in enumerate(batches(60)):
            for table, optimizer in ((ours, rows), (theirs, adam)):
                optimizer.param_groups[0]["lr"] = rate(step)
                table.grad = sparse_gradient(table, ids, noise)
            rows.step()
            with torch.no_grad():
                theirs[ids] *= 1 - rate(step) * decay
            adam.step()
        return ours.detach(), theirs.detach()

    for decay in (0.0, 0.1):
        ours, theirs = sparse_adam(decay)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_lazy_mode_leaves_other_rows_and_their_moments_alone() -> None:
    table = start(torch.float32)
    optimizer = by_rows(table, lazy=True, weight_decay=0.5)
    before = table.detach().clone()
    table.grad = sparse_gradient(table, torch.tensor([3]), torch.ones(1, *ROW_SHAPE))
    optimizer.step()
    optimizer.catch_up()
    changed = (table.detach() != before).flatten(1).any(-1)
    assert changed.nonzero().flatten().tolist() == [3]
    assert "weights_step" not in optimizer.state[table]


@pytest.mark.parametrize("lazy", [False, True])
def test_row_wise_second_moments_are_means_over_rows(lazy: bool) -> None:
    """Against AdamW written out on the whole table."""
    table = start(torch.float64)
    w, m, v = (
        table.detach().clone(),
        torch.zeros(ROWS, *ROW_SHAPE, dtype=torch.float64),
        torch.zeros(ROWS, 1, 1).double(),
    )
    optimizer = by_rows(table, row_wise=True, lazy=lazy, betas=(0.9, 0.99), **SETTINGS)
    for step, (ids, noise) in enumerate(batches(60), start=1):
        gradient = torch.zeros_like(w).index_copy(0, ids, noise)
        touched = torch.zeros(ROWS, 1, 1, dtype=torch.bool).index_fill(0, ids, True) if lazy else torch.tensor(True)
        m = torch.where(touched, 0.9 * m + 0.1 * gradient, m)
        v = torch.where(touched, 0.99 * v + 0.01 * gradient.square().mean((1, 2), keepdim=True), v)
        update = (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)).sqrt() + 1e-8)
        w = torch.where(touched, w * (1 - 1e-2 * 0.1) - 1e-2 * update, w)
        prepare_rows(table, ids)
        table.grad = sparse_gradient(table, ids, noise)
        optimizer.step()
    optimizer.catch_up()
    assert optimizer.state[table]["exp_avg_sq"].shape == (ROWS,)
    assert difference(table.detach(), w, start(torch.float64)) < TOLERANCE


def bytes_of(optimizer: RowAdamW, table: Tensor) -> int:
    state = optimizer.state[table]
    return sum(value.nbytes for value in state.values() if isinstance(value, Tensor))


def test_a_bfloat16_table_without_first_moment_takes_about_two_bytes_a_parameter() -> None:
    table = nn.Parameter(torch.randn(100, 2, 256).bfloat16())
    optimizer = by_rows(table, betas=(0.0, 0.999), row_wise=True, lazy=True)
    ids = torch.arange(0, 100, 7)
    table.grad = sparse_gradient(table, ids, torch.randn(len(ids), 2, 256).bfloat16())
    optimizer.step()
    assert "exp_avg" not in optimizer.state[table]
    assert (table.nbytes + bytes_of(optimizer, table)) / table.numel() < 2.02


def bfloat16_outcomes(**settings: Any) -> tuple[Tensor, Tensor]:
    """Ends of 600 small steps, about a tenth of the spacing of the weights: in bfloat16 and in float64."""
    outcomes = []
    for dtype in (torch.bfloat16, torch.float64):
        table = nn.Parameter(torch.full((64, 8), 1.5, dtype=dtype))
        state_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        optimizer = by_rows(table, lr=4e-4, weight_decay=0.0, lazy=True, state_dtype=state_dtype, **settings)
        ids = torch.arange(64)
        generator = torch.Generator().manual_seed(0)
        for _ in range(600):
            gradient = 1 + 0.1 * torch.randn(64, 8, generator=generator, dtype=torch.float64)
            table.grad = sparse_gradient(table, ids, gradient.to(dtype))
            optimizer.step()
        outcomes.append(table.detach().double())
    return outcomes[0], outcomes[1]


def test_stochastic_rounding_keeps_steps_that_rounding_to_nearest_loses() -> None:
    found, exact = bfloat16_outcomes()
    assert (found.mean() - exact.mean()).abs() < 0.05 * (1.5 - exact.mean())
    lost, _ = bfloat16_outcomes(stochastic_rounding=False)
    assert torch.equal(lost, torch.full_like(lost, 1.5))


def test_stochastic_rounding_is_a_function_of_seed_step_and_row() -> None:
    def outcome(seed: int, order: list[int]) -> Tensor:
        table = nn.Parameter(torch.full((4, 64), 1.5, dtype=torch.bfloat16))
        optimizer = by_rows(table, lazy=True, seed=seed)
        for row in order:
            table.grad = sparse_gradient(table, torch.tensor([row]), torch.ones(1, 64, dtype=torch.bfloat16))
            optimizer.step()
        return table.detach()

    assert torch.equal(outcome(0, [0, 1, 2]), outcome(0, [0, 1, 2]))
    assert not torch.equal(outcome(0, [0, 1, 2]), outcome(1, [0, 1, 2]))
    ends = outcome(0, [0, 1, 2])
    assert not torch.equal(ends[0], ends[1])


class Table(nn.Module):
    """Sums rows; its gradient is sparse where the optimizer takes that."""

    parameter_roles: ClassVar = {"rows": "table"}

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(20, 4))

    def forward(self, ids: Tensor) -> Tensor:
        return look_up(self.rows, ids, lambda rows, sparse: nn.functional.embedding(ids, rows, sparse=sparse).sum(-2))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table = Table()
        self.table_2 = Table()
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.table(ids) + self.table_2(ids // 2))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Examples(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.from_numpy(np.random.default_rng(index).integers(20, size=3))
        return {"ids": ids, "labels": ids.sum() % 3}


def losses(net: Net, optimizer: torch.optim.Optimizer, steps: range, *, micro_batches: int = 1) -> list[float]:
    examples, values = Examples(), []
    for step in steps:
        batch = [examples[(8 * step + i) % 64] for i in range(8)]
        optimizer.zero_grad()
        for part in torch.arange(8).split(8 // micro_batches):
            chosen = [batch[i] for i in part]
            loss = net(*(torch.stack([example[name] for example in chosen]) for name in ("ids", "labels")))["loss"]
            (loss / micro_batches).backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.03 / (1 + step)
        fused = isinstance(optimizer, RowAdamW) and optimizer.defaults["fused"]
        clip_gradients(optimizer.param_groups, max_norm=0.3, table_max_norm=math.inf if fused else 0.1)
        optimizer.step()
        values.append(loss.item())
    return values


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.usefixtures("float64")
def test_a_model_with_clipping_and_micro_batches_trains_as_under_adamw(micro_batches: int) -> None:
    nets = Net(), Net()
    groups = [parameter_groups(net, weight_decay=0.1, table_lr_multiplier=2.0) for net in nets]
    ours, theirs = RowAdamW(groups[0], weight_decay=0.1), torch.optim.AdamW(groups[1], weight_decay=0.1)
    found = losses(nets[0], ours, range(20), micro_batches=micro_batches)
    assert found == pytest.approx(losses(nets[1], theirs, range(20), micro_batches=micro_batches))
    ours.catch_up()
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert difference(one.detach(), other.detach(), torch.zeros_like(one)) < TOLERANCE


def test_dense_parameters_have_the_bits_of_fused_adamw() -> None:
    nets = [nn.Linear(4, 3), nn.Linear(4, 3)]
    nets[1].load_state_dict(nets[0].state_dict())
    ours, theirs = RowAdamW(nets[0].parameters()), torch.optim.AdamW(nets[1].parameters(), fused=True)
    for _ in range(5):
        for net, optimizer in ((nets[0], ours), (nets[1], theirs)):
            optimizer.zero_grad()
            net(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
    assert torch.equal(nets[0].weight, nets[1].weight)
    theirs.load_state_dict(theirs.state_dict())
    assert ours.state[nets[0].weight].keys() == theirs.state[nets[1].weight].keys()


def test_schedulers_and_closures_work() -> None:
    table, other = start(torch.float64), start(torch.float64)
    optimizers = by_rows(table, **SETTINGS), torch.optim.AdamW([other], **SETTINGS)
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.02, total_steps=30) for o in optimizers]
    for ids, noise in batches(30):
        table.grad, other.grad = sparse_gradient(table, ids, noise), dense_gradient(other, ids, noise)
        assert [optimizer.step(lambda: 4.0) for optimizer in optimizers] == [4.0, 4.0]
        for scheduler in schedulers:
            scheduler.step()
    optimizers[0].catch_up()
    assert difference(table.detach(), other.detach(), start(torch.float64)) < TOLERANCE


@pytest.mark.parametrize("quietly", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lazy": True, "row_wise": True},
        {"lazy": True, "state_dtype": torch.bfloat16},
        {"betas": (0.0, 0.99), "row_wise": True},
        {"fused": True},
    ],
    ids=str,
)
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(settings: dict[str, Any], quietly: bool) -> None:
    # Saving lets rows catch up, but for `rows_as_they_are`: the unbroken run is then one that never saved.
    saving = rows_as_they_are if quietly else nullcontext

    def make() -> tuple[Net, RowAdamW]:
        net = Net()
        return net, RowAdamW(parameter_groups(net, weight_decay=0.1), **settings)

    whole, optimizer = make()
    losses(whole, optimizer, range(5))
    if not quietly:
        whole.state_dict()
    losses(whole, optimizer, range(5, 11))
    broken, optimizer = make()
    losses(broken, optimizer, range(5))
    file = io.BytesIO()
    with saving():
        torch.save((broken.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    resumed, optimizer = make()
    model_state, optimizer_state = torch.load(file, weights_only=True)
    resumed.load_state_dict(model_state)
    optimizer.load_state_dict(optimizer_state)
    losses(resumed, optimizer, range(5, 11))
    for expected, found in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_learning_rates_are_kept_no_longer_than_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peerlm.optim.row_adamw._SWEEP_EVERY", 16)
    table = start(torch.float64)
    optimizer = by_rows(table, **SETTINGS)
    expected = short_outcome(lambda other: torch.optim.AdamW([other], **SETTINGS), sparse=False)
    kept = []

    def look(step: int) -> None:
        kept.append(len(optimizer.state[table]["learning_rates"]))

    train(table, optimizer, 1.0, sparse=True, steps=range(60), after_step=look)
    assert max(kept) == 15
    optimizer.catch_up()
    assert len(optimizer.state[table]["learning_rates"]) == 0
    assert difference(table.detach(), expected, start(torch.float64)) < TOLERANCE


def test_a_fused_step_is_the_same_step() -> None:
    outcomes = []
    for fused in (False, True):
        net = Net()
        optimizer = RowAdamW(parameter_groups(net), fused=fused)
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        examples = [Examples()[i] for i in range(8)]
        for _ in range(6):
            optimizer.zero_grad()
            net(torch.stack([e["ids"] for e in examples]), torch.stack([e["labels"] for e in examples]))[
                "loss"
            ].backward()
            assert (net.table.rows.grad is None) == fused
            optimizer.step()
        optimizer.catch_up()
        outcomes.append(net.table.rows.detach())
        assert optimizer.state[net.table.rows]["step"] == 6
    assert torch.equal(*outcomes)


def test_a_fused_step_remembers_the_rate_that_it_took() -> None:
    outcomes = []
    for fused in (False, True):
        net = Net()
        optimizer = RowAdamW(parameter_groups(net), fused=fused)
        for step in range(12):
            group = next(group for group in optimizer.param_groups if group["rows"])
            group["lr"] = 0.01 * (1 + step)
            example = Examples()[step]
            net(example["ids"][None], example["labels"][None])["loss"].backward()
            if fused:
                group["lr"] = 1e9  # too late
            optimizer.step()
            optimizer.zero_grad()
        optimizer.catch_up()
        outcomes.append(net.table.rows.detach())
    assert torch.equal(*outcomes)


def test_a_second_backward_pass_in_a_fused_step_is_refused() -> None:
    net = Net()
    RowAdamW(parameter_groups(net), fused=True)
    example = Examples()[0]
    net(example["ids"][None], example["labels"][None])["loss"].backward()
    with pytest.raises(RuntimeError, match=r"this is the second one before step\(\).*fused=False"):
        net(example["ids"][None], example["labels"][None])["loss"].backward()


def test_a_kernel_may_take_over_the_fused_update() -> None:
    table = start(torch.float32)
    assert fused_row_update(table) is None
    optimizer = by_rows(table)
    assert fused_row_update(table) is None
    optimizer = by_rows(table, fused=True, lr=0.5)
    update = fused_row_update(table)
    assert update is not None
    rows, step = update
    assert (step.step, step.learning_rate) == (1, 0.5)
    assert rows.rows.data_ptr() == table.data_ptr()
    optimizer.step()
    assert optimizer.state[table]["step"] == 1


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_torch_clips_sparse_gradients_as_dense_ones(norm_type: float) -> None:
    ids, values = torch.tensor([4, 1, 4]), torch.randn(3, *ROW_SHAPE).double()
    tables = [start(torch.float64), start(torch.float64)]
    by_rows(tables[0])
    norms, gradients = [], []
    for table in tables:
        table.grad = torch.sparse_coo_tensor(ids[None], values, table.shape, check_invariants=True)
        if table is tables[1]:
            table.grad = table.grad.to_dense()
        bias = nn.Parameter(torch.ones(3))
        bias.grad = torch.full((3,), 0.5)
        norms.append(torch.nn.utils.clip_grad_norm_([table, bias], 0.1, norm_type).item())
        gradients.append((table.grad.to_dense(), bias.grad))
    assert norms[0] == pytest.approx(norms[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_norms_of_sparse_tensors_that_nobody_needs_are_refused() -> None:
    by_rows(start(torch.float32))
    with pytest.raises(NotImplementedError, match="only the norm of all entries is known, for ord > 0"):
        torch.linalg.vector_norm(torch.eye(2).to_sparse(), dim=0)


def test_a_fused_step_cannot_be_clipped() -> None:
    net = Net()
    optimizer = RowAdamW(parameter_groups(net), fused=True)
    with pytest.raises(ValueError, match=r"no gradient of tables to clip to table_max_norm = 1\.0: choose fused=False"):
        clip_gradients(optimizer.param_groups, max_norm=1.0, table_max_norm=1.0)
    clip_gradients(optimizer.param_groups, max_norm=1.0, table_max_norm=math.inf)


@pytest.mark.slow
def test_the_stock_trainer_trains_and_resumes(tmp_path: Path) -> None:
    def trainer() -> tuple[Trainer, RowAdamW]:
        net = Net()
        optimizer = RowAdamW(parameter_groups(net))
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=12,
            save_steps=6,
            logging_steps=2,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=3e-2,
            max_grad_norm=0.5,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=12)
        return Trainer(net, arguments, train_dataset=Examples(), optimizers=(optimizer, schedule)), optimizer

    whole, optimizer = trainer()
    whole.train()
    assert optimizer.state[whole.model.table.rows]["step"] == 12
    resumed, _ = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_gradients_that_are_not_finite_show_in_the_weights() -> None:
    table = start(torch.float32)
    optimizer = by_rows(table)
    gradient = torch.ones(2, *ROW_SHAPE)
    gradient[0, 0, 0], gradient[1, 0, 0] = math.nan, math.inf
    table.grad = sparse_gradient(table, torch.tensor([3, 5]), gradient)
    optimizer.step()
    assert table[3, 0, 0].isnan()
    assert table[5, 0, 0].isnan()
    assert table.isnan().sum() == 2


def test_a_sum_of_sparse_gradients_is_taken_whole() -> None:
    table, other = start(torch.float64), start(torch.float64)
    optimizers = by_rows(table), by_rows(other)
    parts = [
        (torch.tensor([1, 4]), torch.randn(2, *ROW_SHAPE).double()),
        (torch.tensor([2, 4]), torch.randn(2, *ROW_SHAPE).double()),
    ]
    ids, values = (torch.cat(both) for both in zip(*parts, strict=True))
    table.grad = torch.sparse_coo_tensor(ids[None], values, table.shape, check_invariants=True)
    assert not table.grad.is_coalesced()
    other.grad = torch.add(*(dense_gradient(other, ids, values) for ids, values in parts))
    for optimizer in optimizers:
        optimizer.step()
        optimizer.catch_up()
    torch.testing.assert_close(table, other, rtol=1e-12, atol=0)


def test_no_row_has_a_gradient() -> None:
    table = start(torch.float32)
    optimizer = by_rows(table)
    table.grad = sparse_gradient(table, torch.zeros(0, dtype=torch.int64), torch.zeros(0, *ROW_SHAPE))
    optimizer.step()
    assert optimizer.state[table]["step"] == 1


def test_reading_rows_does_not_disturb_an_open_graph() -> None:
    table = start(torch.float64)
    optimizer = by_rows(table, **SETTINGS)
    train(table, optimizer, 1.0, sparse=True, steps=range(10))
    ids = torch.tensor([1, 2])
    weights = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)

    def compute(rows: Tensor, row_gradients: bool) -> Tensor:
        return nn.functional.embedding_bag(ids[None], rows.flatten(1), mode="sum", per_sample_weights=weights)

    rows = look_up(table, ids, compute)
    before = as_it_is(table)
    prepare_rows(table, None)  # the graph has kept the whole table
    assert not torch.equal(before, table)
    rows.sum().backward()
    torch.testing.assert_close(weights.grad[0], table.detach()[ids].sum((1, 2)))
    assert table.grad is not None


def test_a_new_optimizer_takes_over_a_table_that_has_caught_up() -> None:
    table = start(torch.float64)
    twin = start(torch.float64)
    for each in (table, twin):
        train(each, by_rows(each, **SETTINGS), 1.0, sparse=True, steps=range(30))
    prepare_rows(twin, None)
    assert not torch.equal(as_it_is(twin), as_it_is(table))
    by_rows(table, **SETTINGS)
    assert torch.equal(as_it_is(twin), as_it_is(table))


def test_a_table_without_any_other_reference_to_its_optimizer_is_still_read_right() -> None:
    expected = short_outcome(lambda table: by_rows(table, **SETTINGS), sparse=True)
    table = start(torch.float64)
    train(table, by_rows(table, **SETTINGS), 1.0, sparse=True, steps=range(60))
    prepare_rows(table, None)
    assert torch.equal(table.detach(), expected)


def test_models_are_copied_and_pickled_without_their_optimizer() -> None:
    net = Net()
    RowAdamW(parameter_groups(net))
    assert wants_row_gradients(net.table.rows)
    for clone in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert not wants_row_gradients(clone.table.rows)
        prepare_rows(clone.table.rows, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, r"lr = -1\.0 is out of range"),
        ({"betas": (1.0, 0.9)}, r"betas = \(1\.0, 0\.9\) is out of range"),
        ({"eps": -1.0}, r"eps = -1\.0 is out of range"),
        ({"weight_decay": -1.0}, r"weight_decay = -1\.0 is out of range"),
        ({"eps": 0.0}, r"eps = 0: .* pass lazy=True"),
        ({"betas": (0.9, 0.8)}, r"betas = \(0\.9, 0\.8\): rows cannot catch up accurately"),
        ({"betas": (0.95, 0.95)}, r"betas = \(0\.95, 0\.95\): .* raise beta2, lower beta1, or pass lazy=True"),
        ({"state_dtype": torch.bfloat16}, r"state_dtype = torch\.bfloat16\): pass lazy=True, or betas with beta1 = 0"),
        ({"state_dtype": torch.float16}, r"state_dtype = torch\.float16: tables keep moments in"),
        ({"maximize": True}, r"maximize=True is not supported: negate the loss"),
    ],
    ids=str,
)
def test_settings_that_do_not_work_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        by_rows(start(torch.float32), **settings)


def test_tables_that_exact_mode_cannot_hold_are_named() -> None:
    with pytest.raises(ValueError, match=r"got a table in torch\.bfloat16, .* pass lazy=True"):
        by_rows(start(torch.bfloat16))
    with pytest.raises(ValueError, match=r"a table has dtype torch\.float16: tables are float32, float64, bfloat16, "):
        by_rows(start(torch.float16))


def test_gradients_that_do_not_fit_are_named() -> None:
    table = nn.Parameter(torch.ones(3, 4))
    optimizer = RowAdamW([table])
    table.grad = torch.ones(3, 4).to_sparse(1)
    with pytest.raises(ValueError, match=r"a parameter \(3, 4\) outside the tables has a sparse gradient"):
        optimizer.step()
    optimizer = by_rows(table)
    table.grad = torch.ones(3, 4).to_sparse(2)
    with pytest.raises(ValueError, match=r"gradient of a table \(3, 4\) has 2 sparse dimensions"):
        optimizer.step()


def test_a_rate_that_turns_weights_round_is_named() -> None:
    table = start(torch.float32)
    optimizer = by_rows(table, lr=2.0, weight_decay=0.5)
    table.grad = torch.ones_like(table)
    with pytest.raises(ValueError, match=r"lr \* weight_decay = 2\.0 \* 0\.5 must be below 1: lower either"):
        optimizer.step()


def test_momentum_cannot_appear_during_training() -> None:
    table = start(torch.float32)
    optimizer = by_rows(table, betas=(0.0, 0.9))
    train(table, optimizer, 1.0, sparse=True, steps=range(2))
    optimizer.param_groups[0]["betas"] = (0.9, 0.95)
    with pytest.raises(ValueError, match=r"beta1 cannot change from 0\.0 to 0\.9 during training"):
        train(table, optimizer, 1.0, sparse=True, steps=range(2, 3))


def test_a_state_of_another_kind_is_named() -> None:
    tables = start(torch.float32), start(torch.float32)
    whole, row_wise = by_rows(tables[0]), by_rows(tables[1], row_wise=True)
    train(tables[1], row_wise, 1.0, sparse=True, steps=range(2))
    saved = row_wise.state_dict()
    saved["param_groups"][0]["row_wise"] = False
    with pytest.raises(ValueError, match=r"the saved 'exp_avg_sq' of a table has shape \(48,\), not \(48, 2, 6\)"):
        whole.load_state_dict(saved)


def test_a_group_that_is_refused_is_not_added() -> None:
    optimizer = by_rows(start(torch.float32))
    with pytest.raises(ValueError, match="out of range"):
        optimizer.add_param_group({"params": [start(torch.float32)], "rows": True, "lr": -1.0})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [start(torch.float32)], "name": "table", "betas": (0.0, 0.9)})
    assert optimizer.param_groups[1]["rows"]


def test_a_dense_gradient_of_a_table_is_stepped_by_where_the_table_is(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Tensor] = []
    monkeypatch.setattr(
        "peerlm.optim.row_adamw._dense_step", lambda parameters, states, group: steps.append(states[0]["step"])
    )
    table = nn.Parameter(torch.empty(5, 3, device="meta"))
    optimizer = RowAdamW([{"params": [table], "rows": True}])
    table.grad = torch.empty_like(table)
    optimizer.step()
    assert [step.device.type for step in steps] == ["meta"]
