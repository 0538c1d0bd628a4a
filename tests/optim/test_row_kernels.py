"""The native row kernels against their definition in `row_step`."""

import pytest
import torch
from torch import Tensor

from peerlm.ops.cpu import native
from peerlm.ops.cpu import rows as native_rows
from peerlm.ops.row_updates import RowState, RowStep
from peerlm.optim import RowAdamW, row_step
from peerlm.optim.catch_up import RateHistory, catch_up_rules
from peerlm.testing import assert_within_budget

pytestmark = pytest.mark.skipif(bool(native.unavailable()), reason=f"no native kernels: {native.unavailable()}")

NOW = 150
KINDS = {
    "plain": {},
    "row-wise": {"row_wise": True},
    "no first moment": {"first": False},
    "neither": {"first": False, "row_wise": True},
    "bf16 rows": {"rows": torch.bfloat16},
    "bf16 rows alone": {"rows": torch.bfloat16, "first": False, "row_wise": True},
    "bf16 moments": {"moments": torch.bfloat16},
    "bf16": {"rows": torch.bfloat16, "moments": torch.bfloat16},
    "lazy": {"lazy": True},
}


def random_table(
    row_shape: tuple[int, ...],
    *,
    first: bool = True,
    row_wise: bool = False,
    lazy: bool = False,
    rows: torch.dtype = torch.float32,
    moments: torch.dtype = torch.float32,
) -> RowState:
    num_rows = 40
    shape = (num_rows, *row_shape)
    moments_step = torch.randint(0, NOW - 1, (num_rows,), dtype=torch.int32)
    weights_step = torch.maximum(moments_step, torch.randint(0, NOW, (num_rows,), dtype=torch.int32))
    weights_step[::3] = moments_step[::3]
    never = (moments_step == 0).view(-1, *[1] * len(row_shape))
    exp_avg = torch.randn(shape).masked_fill_(never, 0)
    size = shape if not row_wise else (num_rows,)
    exp_avg_sq = torch.randn(size).square().masked_fill_(never.flatten() if row_wise else never, 0)
    # Some elements at the scale of eps, where nodes matter most
    exp_avg.view(num_rows, -1)[:, ::2] *= 1e-8
    if not row_wise:
        exp_avg_sq.view(num_rows, -1)[:, ::2] *= 1e-16
    return RowState(
        rows=torch.randn(shape).to(rows),
        exp_avg=exp_avg.to(moments) if first else None,
        exp_avg_sq=exp_avg_sq if row_wise else exp_avg_sq.to(moments),
        moments_step=None if lazy else moments_step,
        weights_step=None if lazy else weights_step,
    )


def tensors(table: RowState) -> dict[str, Tensor]:
    return {name: value for name, value in vars(table).items() if value is not None}


def copy_of(table: RowState, dtype: torch.dtype | None = None) -> RowState:
    """A copy, its floats in `dtype` if one is named."""
    copies = {
        n: v.to(dtype if dtype and v.is_floating_point() else v.dtype, copy=True) for n, v in tensors(table).items()
    }
    return RowState(**{name: copies.get(name) for name in vars(table)})


def twins(table: RowState) -> tuple[RowState, RowState]:
    return copy_of(table), copy_of(table)


def step_of(table: RowState, *, seed: int | None = 5, learning_rate: float = 1e-2) -> RowStep:
    beta1 = 0.0 if table.exp_avg is None else 0.9
    return RowStep(
        step=NOW, learning_rate=learning_rate, weight_decay=0.1, beta1=beta1, beta2=0.95, eps=1e-8, seed=seed
    )


def units_apart(a: Tensor, b: Tensor) -> Tensor:
    """How many bfloat16 numbers lie between two of one sign, and one more where they differ."""
    return (a.view(torch.int16).int() - b.view(torch.int16).int()).abs()


def assert_alike(found: RowState, expected: RowState, exact: RowState) -> None:
    """Within the budget of the definition; in bfloat16 up to one unit, where rounding tips a random decision."""
    for name, value in tensors(expected).items():
        ours = tensors(found)[name]
        if value.dtype == torch.bfloat16:
            apart = units_apart(ours, value)
            assert apart.max() <= 1, name
            # A unit is 2^16 of float32: so many roundings tip one decision, and a number has a few before it is stored
            assert (apart > 0).sum() <= 3 + 32 * apart.numel() / 2**16, name
        elif value.is_floating_point():
            assert_within_budget(ours, value, tensors(exact)[name])
        else:
            assert torch.equal(ours, value), name


@pytest.mark.parametrize("row_shape", [(1,), (2, 31), (512,)])
@pytest.mark.parametrize("kind", KINDS)
def test_an_update_is_that_of_the_definition(kind: str, row_shape: tuple[int, ...]) -> None:
    found, expected = twins(random_table(row_shape, **KINDS[kind]))
    exact = copy_of(found, torch.float64)
    ids = torch.tensor([0, 3, 7, 8, 39])
    gradient = torch.randn(5, *row_shape).to(found.rows.dtype)
    sides = (native_rows, found), (row_step, expected), (row_step, exact)
    for functions, table in sides:
        functions.update_rows(table, ids, gradient.to(table.rows.dtype), step_of(table))
    assert_alike(found, expected, exact)
    for functions, table in sides:
        functions.update_rows(table, None, torch.ones_like(table.rows), step_of(table))
    assert_alike(found, expected, exact)


@pytest.mark.parametrize("row_shape", [(1,), (2, 31), (512,)])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lazy"])
def test_catching_up_is_that_of_the_definition(kind: str, row_shape: tuple[int, ...]) -> None:
    found, expected = twins(random_table(row_shape, **KINDS[kind]))
    step = step_of(found)
    history = RateHistory.empty(0)
    for number in range(NOW):
        history = history.append(1e-2 / (1 + number), 0.1)
    assert found.weights_step is not None
    ids = (found.weights_step < NOW).nonzero().flatten()
    rules = catch_up_rules(history, found.weights_step[ids].unique().long(), step.beta1, step.beta2)
    before, exact = found.rows.clone(), copy_of(found, torch.float64)
    native_rows.catch_up_rows(found, ids, rules, step)
    row_step.catch_up_rows(expected, ids, rules, step)
    row_step.catch_up_rows(exact, ids, rules, step)
    assert not torch.equal(found.rows, before)
    assert_alike(found, expected, exact)
    again = found.rows.clone()
    rules.index[-1] = 0  # no rule is for rows that are up to date
    native_rows.catch_up_rows(found, ids, rules, step)
    assert torch.equal(found.rows, again)


@pytest.mark.parametrize("kind", ["plain", "bf16"])
def test_threads_do_not_change_bits(kind: str) -> None:
    one, two = twins(random_table((2, 31), **KINDS[kind]))
    gradient = torch.randn(40, 2, 31)
    native_rows.update_rows(one, None, gradient, step_of(one))
    torch.set_num_threads(3)
    try:
        native_rows.update_rows(two, None, gradient, step_of(two))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(tensors(one)[name], tensors(two)[name]) for name in tensors(one))


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, 0.0, -0.0, 1e-40])
def test_extreme_values_round_alike(value: float, seed: int | None) -> None:
    found, expected = twins(random_table((16,), rows=torch.bfloat16, lazy=True))
    gradient = torch.full((1, 16), value)
    ids = torch.tensor([2])
    for functions, table in ((native_rows, found), (row_step, expected)):
        functions.update_rows(table, ids, gradient, step_of(table, seed=seed))
    numbers = ~expected.rows[2].isnan()
    assert torch.equal(~found.rows[2].isnan(), numbers)
    assert (units_apart(found.rows[2][numbers], expected.rows[2][numbers]) <= 1).all()


@pytest.mark.parametrize("row", [-1, 40])
def test_rows_out_of_range_change_nothing(row: int) -> None:
    table, before = twins(random_table((4,)))
    with pytest.raises(IndexError):
        native_rows.update_rows(table, torch.tensor([0, row]), torch.ones(2, 4), step_of(table))
    assert torch.equal(table.rows, before.rows)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("num_rows", "count"), [(40, 7), (40, 300), (64, 64), (20_001, 50), (20_001, 9_000), (5, 0)])
def test_rows_behind_are_found(num_rows: int, count: int, threads: int) -> None:
    steps = torch.randint(NOW - 2, NOW + 1, (num_rows,), dtype=torch.int32)
    table = RowState(
        rows=torch.empty(num_rows, 1), exp_avg=None, exp_avg_sq=torch.empty(0), moments_step=None, weights_step=steps
    )
    ids = torch.randint(num_rows, (count, 1))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for asked in (ids, None):
            found = native_rows.rows_behind(table, asked, NOW)
            assert torch.equal(found, row_step.rows_behind(table, asked, NOW))
            among = range(num_rows) if asked is None else set(asked.flatten().tolist())
            assert found.tolist() == [row for row in sorted(among) if steps[row] < NOW]
    finally:
        torch.set_num_threads(before)
    with pytest.raises(IndexError, match=f"expert id {num_rows} is not in 0 .. {num_rows - 1}"):
        native_rows.rows_behind(table, torch.tensor([num_rows]), NOW)


def test_a_run_of_the_optimizer_is_the_same_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def outcome(dtype: torch.dtype = torch.float32) -> Tensor:
        table = torch.nn.Parameter(torch.randn(30, 2, 5, generator=torch.Generator().manual_seed(1)).to(dtype))
        optimizer = RowAdamW([{"params": [table], "rows": True}], lr=1e-2, weight_decay=0.1)
        generator = torch.Generator().manual_seed(2)
        for _ in range(50):
            ids = torch.randint(30, (4,), generator=generator).unique()
            values = torch.randn(len(ids), 2, 5, generator=generator).to(dtype)
            table.grad = torch.sparse_coo_tensor(ids[None], values, table.shape, check_invariants=True)
            optimizer.step()
        optimizer.catch_up()
        return table.detach()

    found = outcome()
    monkeypatch.setattr("peerlm.optim.row_adamw._kernels", lambda table: row_step)
    assert_within_budget(found, outcome(), outcome(torch.float64))
