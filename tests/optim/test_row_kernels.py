"""The native row kernels against their definition in `row_step`."""

import pytest
import torch
from torch import Tensor

from peerlm.ops.cpu import native
from peerlm.ops.cpu import rows as native_rows
from peerlm.ops.row_updates import RowState
from peerlm.optim import RowAdamW, row_step
from peerlm.optim.catch_up import RateHistory, catch_up_rules
from peerlm.testing import assert_within_budget

from ..row_tables import KINDS, NOW, assert_alike, copy_of, random_table, step_of, tensors, twins, units_apart

pytestmark = pytest.mark.skipif(bool(native.unavailable()), reason=f"no native kernels: {native.unavailable()}")


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
