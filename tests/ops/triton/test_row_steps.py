"""Steps of tables by Triton kernels against their definition in `optim/row_step.py`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from peerlm.layers import ExpertTable
from peerlm.ops.operators import PEERLM
from peerlm.ops.reference_operators import KERNELS
from peerlm.ops.row_updates import CatchUpRules, RowState, RowStep, prepare_rows
from peerlm.ops.triton import fused_update, row_arithmetic, row_catch_up, row_steps
from peerlm.ops.triton.fused_update import update_by_gradients
from peerlm.optim import RowAdamW, row_step
from peerlm.optim.catch_up import RateHistory, catch_up_rules
from peerlm.testing import assert_within_budget

from ...row_tables import KINDS, NOW, assert_alike, copy_of, random_table, step_of, tensors, twins, units_apart
from .placed_tables import placed_on, read_back

EXACT_KINDS = [kind for kind in KINDS if kind != "lazy"]
SHAPES = [(1,), (2, 31)]


def rules_for(table: RowState) -> CatchUpRules:
    """For every step at which a row of `random_table` may have been right last, after a decaying learning rate."""
    history = RateHistory.empty(0)
    for number in range(NOW):
        history = history.append(1e-2 / (1 + number), 0.1)
    step = step_of(table)
    return catch_up_rules(history, torch.arange(NOW), step.beta1, step.beta2)


def same(a: RowState, b: RowState) -> bool:
    return all(torch.equal(tensors(a)[name].cpu(), tensors(b)[name].cpu()) for name in tensors(a))


def untouched(a: RowState, b: RowState, rows: list[int]) -> bool:
    return all(torch.equal(tensors(a)[name][rows].cpu(), tensors(b)[name][rows].cpu()) for name in tensors(a))


@contextmanager
def small_pieces() -> Iterator[None]:
    """Rows are worked on few elements at a time, and stale rows by few programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_arithmetic, "_MOST_AT_ONCE", 16)
        patch.setattr(row_catch_up, "_PROGRAMS", 3)
        patch.setattr(fused_update, "tile_of_entries", lambda dim: (16, 16))
        yield


@pytest.mark.parametrize("row_shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_update_is_that_of_the_definition(kind: str, row_shape: tuple[int, ...], device: torch.device) -> None:
    before = random_table(row_shape, **KINDS[kind])
    (found, expected), exact = twins(before), copy_of(before, torch.float64)
    found = placed_on(device, found)
    ids, gradient = torch.tensor([0, 3, 7, 8, 39]), torch.randn(5, *row_shape).to(found.rows.dtype)
    with small_pieces():
        row_steps.update_rows(found, ids.to(device), gradient.to(device), step_of(found))
    for table in (expected, exact):
        row_step.update_rows(table, ids, gradient.to(table.rows.dtype), step_of(table))
    assert_alike(read_back(found), expected, exact)
    assert untouched(found, before, [1, 2, 4, 5, 6, 9, 38])


@pytest.mark.parametrize("kind", ["plain", "row-wise", "bf16"])
def test_an_update_of_all_rows_is_that_of_the_definition(kind: str, device: torch.device) -> None:
    found, expected = twins(random_table((3, 7), **KINDS[kind]))
    exact, found = copy_of(found, torch.float64), placed_on(device, found)
    gradient = torch.randn(3, 7, 40).to(found.rows.dtype).permute(2, 0, 1)
    row_steps.update_rows(found, None, gradient.to(device), step_of(found))
    for table in (expected, exact):
        row_step.update_rows(table, None, gradient.to(table.rows.dtype), step_of(table))
    assert_alike(read_back(found), expected, exact)


@pytest.mark.parametrize("seed", [None, 5, -3, 2**40])
def test_moments_that_do_not_age_have_the_bits_of_the_definition(seed: int | None, device: torch.device) -> None:
    found, expected = twins(random_table((67,), rows=torch.bfloat16, moments=torch.bfloat16, lazy=True))
    found, gradient = placed_on(device, found), torch.randn(40, 67)
    row_steps.update_rows(found, None, gradient.to(device), step_of(found, seed=seed))
    row_step.update_rows(expected, None, gradient, step_of(expected, seed=seed))
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(tensors(found)[name].cpu(), tensors(expected)[name])
    apart = units_apart(found.rows.cpu(), expected.rows)
    assert apart.max() <= 1
    assert (apart > 0).sum() <= 3


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy warns of what overflows
@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, 0.0, -0.0, 1e-40])
def test_extreme_values_round_alike(value: float, seed: int | None, device: torch.device) -> None:
    found, expected = twins(random_table((16,), rows=torch.bfloat16, moments=torch.bfloat16, lazy=True))
    found, ids, gradient = placed_on(device, found), torch.tensor([2]), torch.full((1, 16), value)
    row_steps.update_rows(found, ids.to(device), gradient.to(device), step_of(found, seed=seed))
    row_step.update_rows(expected, ids, gradient, step_of(expected, seed=seed))
    for name, theirs in tensors(expected).items():
        ours = tensors(found)[name].cpu()
        assert torch.equal(ours.isnan(), theirs.isnan())
        numbers = ~theirs.isnan()
        assert (units_apart(ours[numbers], theirs[numbers]) <= 1).all()


@pytest.mark.parametrize("kind", ["plain", "row-wise", "bf16"])
def test_padding_of_an_update_changes_nothing(kind: str, device: torch.device) -> None:
    before = placed_on(device, random_table((2, 5), **KINDS[kind]))
    padded, plain = twins(before)
    ids = torch.tensor([4, 9, -1, 40, 2**40], device=device)
    gradient = torch.randn(5, 2, 5, device=device)
    gradient[2:] = torch.nan
    row_steps.update_rows(padded, ids, gradient, step_of(padded))
    row_steps.update_rows(plain, ids[:2], gradient[:2], step_of(plain))
    assert same(padded, plain)
    assert not same(padded, before)


@pytest.mark.parametrize("row_shape", SHAPES)
@pytest.mark.parametrize("kind", EXACT_KINDS)
def test_looked_up_entries_catch_up_their_rows(kind: str, row_shape: tuple[int, ...], device: torch.device) -> None:
    before = random_table(row_shape, **KINDS[kind])
    (found, expected), exact = twins(before), copy_of(before, torch.float64)
    found, step, rules = placed_on(device, found), step_of(before), rules_for(before)
    ids = torch.tensor([[5, 39, 5, 0, 12, 40], [5, 0, 7, 13, 5, -1]])
    assert before.weights_step is not None
    stale = [row for row in (0, 5, 7, 12, 13, 39) if before.weights_step[row] < NOW]
    for table in (expected, exact):
        row_step.catch_up_rows(table, torch.tensor(stale), rules, step)
    placed = row_steps.place_rules(rules, step.eps, device)
    placed[1 + NOW] = 3.0  # for rows that are up to date: to be used for none
    with small_pieces():
        row_steps.catch_up_entries(found, ids.to(device), placed, step)
    assert_alike(read_back(found), expected, exact)
    assert untouched(found, before, [row for row in range(40) if row not in stale])
    once = copy_of(found)
    row_steps.catch_up_entries(found, ids.to(device), placed, step)
    assert same(found, once)


@pytest.mark.parametrize("kind", ["plain", "row-wise", "no first moment"])
def test_all_rows_catch_up(kind: str, device: torch.device) -> None:
    before = random_table((5,), **KINDS[kind])
    (found, expected), exact = twins(before), copy_of(before, torch.float64)
    found, step, rules = placed_on(device, found), step_of(before), rules_for(before)
    stale = row_step.rows_behind(before, None, NOW)
    assert torch.equal(row_steps.rows_behind(found, None, NOW).cpu(), stale)
    for table in (expected, exact):
        row_step.catch_up_rows(table, stale, rules, step)
    listed = copy_of(found)
    row_steps.catch_up_rows(listed, stale.to(device), rules, step)
    row_steps.catch_up_entries(found, None, row_steps.place_rules(rules, step.eps, device), step)
    assert_alike(read_back(found), expected, exact)
    assert same(found, listed)


LATE = 2**30 - 5


def test_rules_may_begin_late(device: torch.device) -> None:
    table = placed_on(device, random_table((3,)))
    table.weights_step.fill_(LATE + 2)  # type: ignore[union-attr]
    table.moments_step.fill_(LATE + 2)  # type: ignore[union-attr]
    before = table.rows.clone()
    history = RateHistory.empty(LATE)
    for rate in (0.5, 0.25, 0.125):
        history = history.append(rate, 0.5)
    rules = catch_up_rules(history, torch.tensor([LATE + 2]), 0.0, 0.999)
    step = RowStep(step=LATE + 3, learning_rate=0.0, weight_decay=0.0, beta1=0.0, beta2=0.999, eps=1e-8, seed=None)
    row_steps.catch_up_rows(table, torch.tensor([3], device=device), rules, step)
    torch.testing.assert_close(table.rows[3], before[3] * (1 - 0.125 * 0.5))
    assert torch.equal(table.rows[4:], before[4:])


def mixtures(row_shape: tuple[int, ...], with_x: bool, tokens: int) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """x, grad_y, ids and coefficients, 6 per token; row 7 has most of the entries."""
    ids = torch.randint(0, 9, (tokens, 6))
    ids[1:, 1:] = 7
    ids[0, 0] = 39
    vectors = row_shape[0] if with_x else 1
    x = torch.randn(tokens, row_shape[-1]) if with_x else None
    return x, torch.randn(tokens, row_shape[-1]), ids, torch.randn(tokens, 6, vectors)


@pytest.mark.parametrize(
    ("kind", "row_shape", "with_x", "tokens"),
    [
        ("plain", (2, 20), True, 4),
        ("plain", (3, 9), True, 4),
        ("plain", (21,), False, 60),
        ("row-wise", (2, 20), True, 4),
        ("row-wise", (2, 5), True, 60),
        ("neither", (21,), False, 4),
        ("neither", (3, 9), True, 4),
        ("bf16", (2, 20), True, 4),
        ("lazy", (3, 5), True, 4),
    ],
)
def test_a_fused_update_is_that_of_the_definition(
    kind: str, row_shape: tuple[int, ...], with_x: bool, tokens: int, device: torch.device
) -> None:
    before = random_table(row_shape, **KINDS[kind])
    (found, expected), exact = twins(before), copy_of(before, torch.float64)
    found = placed_on(device, found)
    again = copy_of(found)
    x, grad_y, ids, coefficients = mixtures(row_shape, with_x, tokens)
    for table, dtype in ((expected, torch.float32), (exact, torch.float64)):
        wide = [None if value is None else value.to(dtype) for value in (x, grad_y, coefficients)]
        rows, gradient = KERNELS["gradients_by_row"](*wide[:2], ids, wide[2], 40)  # type: ignore[misc]
        row_step.update_rows(table, rows, gradient.view(-1, *row_shape), step_of(table))
    arguments = [None if value is None else value.to(device) for value in (x, grad_y, ids, coefficients)]
    with small_pieces():
        for table in (found, again):
            update_by_gradients(table, step_of(table), *arguments)  # type: ignore[arg-type]
    assert_alike(read_back(found), expected, exact)
    assert same(found, again)
    assert untouched(found, before, sorted(set(range(40)) - set(ids.flatten().tolist())))


def test_entries_of_no_row_update_none(device: torch.device) -> None:
    found, expected = twins(placed_on(device, random_table((2, 5))))
    x, grad_y, ids, coefficients = (value.to(device) for value in mixtures((2, 5), True, 3))  # type: ignore[union-attr]
    wrong, without = ids.clone(), coefficients.clone()
    wrong[1, 0], wrong[2, 0] = -1, 40
    without[1, 0] = without[2, 0] = 0
    ids[1:, 0] = 7
    update_by_gradients(found, step_of(found), x, grad_y, wrong, coefficients)
    update_by_gradients(expected, step_of(expected), x, grad_y, ids, without)
    assert same(found, expected)


@pytest.mark.parametrize("shape", [(0, 6), (5, 0)])
def test_a_fused_update_without_entries_changes_nothing(shape: tuple[int, int], device: torch.device) -> None:
    table, before = twins(placed_on(device, random_table((4,))))
    ids = torch.zeros(shape, dtype=torch.int64, device=device)
    coefficients = torch.zeros(*shape, 1, device=device)
    update_by_gradients(table, step_of(table), None, torch.zeros(shape[0], 4, device=device), ids, coefficients)
    assert same(table, before)


def test_numbers_in_a_kept_tensor_are_those_of_the_step(device: torch.device) -> None:
    found, expected = twins(placed_on(device, random_table((5,), lazy=True)))
    gradient = torch.randn(40, 5, device=device)
    early, late = step_of(found, learning_rate=0.5), step_of(found)
    kept = row_steps.place_step(early, device)
    assert row_steps.place_step(late, device, kept) is kept
    row_steps.update_rows(found, None, gradient, RowStep(**{**vars(early), "placed": kept}))
    row_steps.update_rows(expected, None, gradient, late)
    assert same(found, expected)


def trained(
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    *,
    interpreted: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Rows and inputs' gradients after some steps of a table of experts with RowAdamW."""
    with monkeypatch.context() as patch:
        where = device if interpreted else torch.device("cpu")
        functions = row_steps if interpreted else row_step
        patch.setattr("peerlm.optim.row_adamw._kernels", lambda table: functions)
        fused = {where.type: update_by_gradients} if interpreted else {}
        patch.setattr(PEERLM, "_fused_updates", fused)
        generator = torch.Generator().manual_seed(0)
        table = ExpertTable(24, 6, backend="reference" if dtype == torch.float64 else "auto").to(where, dtype)
        table.write(torch.randn(24, 2, 6, generator=generator))
        optimizer = RowAdamW(table.parameters(), lr=1e-2, weight_decay=0.1, **settings)
        total = torch.zeros((), dtype=dtype, device=where)
        for number in range(6):
            ids = torch.randint(0, 24, (3, 4), generator=generator)
            x, weights, target = (torch.randn(3, size, generator=generator).to(where, dtype) for size in (6, 4, 6))
            loss = (table.mix(weights, ids.to(where), x) - target).square().sum()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (1 + number)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach()
        return {"rows": table.read().detach().cpu(), "loss": total.cpu()}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lazy": True},
        {"row_wise": True},
        {"betas": (0.0, 0.99), "row_wise": True},
        {"fused": True},
        {"fused": True, "lazy": True, "row_wise": True},
    ],
    ids=str,
)
def test_a_training_is_that_of_the_definition(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    found = trained(settings, monkeypatch, device, interpreted=True)
    plain = trained(settings, monkeypatch, device)
    exact = trained(settings, monkeypatch, device, dtype=torch.float64)
    assert_within_budget(found, plain, exact)


@pytest.mark.parametrize("kind", ["plain", "row-wise", "bf16"])
def test_gradients_of_repeated_rows_are_added_up(kind: str, device: torch.device) -> None:
    before = random_table((2, 9), **KINDS[kind])
    (found, expected), exact = twins(before), copy_of(before, torch.float64)
    found = placed_on(device, found)
    ids, gradient = torch.tensor([7, 3, 39, 7, -1, 3, 7]), torch.randn(7, 2, 9).to(before.rows.dtype)
    rows, places = ids[ids >= 0].unique(return_inverse=True)
    for table, dtype in ((expected, torch.float32), (exact, torch.float64)):
        summed = torch.zeros(3, 2, 9, dtype=dtype).index_add_(0, places, gradient[ids >= 0].to(dtype))
        row_step.update_rows(table, rows, summed, step_of(table))
    row_steps.update_entries(found, ids.to(device), gradient.to(device), step_of(found))
    assert_alike(read_back(found), expected, exact)


class Recorded:
    """The kernels of `row_steps`; while a graph is captured, calls are kept and not made."""

    def __init__(self) -> None:
        self.capturing = False
        self.calls: list[Callable[[], None]] = []
        self.place_step, self.place_rules = row_steps.place_step, row_steps.place_rules

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        if self.capturing:
            self.calls.append(partial(function, *arguments))
        else:
            function(*arguments)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return partial(self._call, getattr(row_steps, name))


@pytest.mark.parametrize("lazy", [False, True])
def test_a_replayed_step_is_the_next_step(lazy: bool, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    recorded = Recorded()
    unplaced = SimpleNamespace(**{name: getattr(row_steps, name) for name in row_steps.__all__ if name != "place_step"})
    for module in ("placed", "row_adamw"):
        monkeypatch.setattr(f"peerlm.optim.{module}.capturing", lambda device: recorded.capturing)
    monkeypatch.setattr("peerlm.optim.row_adamw._SWEEP_EVERY", 8)
    tables = [torch.randn(12, 3, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    eager_table, replayed_table = (torch.nn.Parameter(table.to(device)) for table in tables)
    eager_rows = eager_table.data_ptr()  # asked for before it is watched
    groups = [[{"params": [table], "rows": True}] for table in (eager_table, replayed_table)]
    optimizers = [RowAdamW(group, lr=1e-2, weight_decay=0.1, lazy=lazy) for group in groups]
    monkeypatch.setattr(
        "peerlm.optim.row_adamw._kernels",
        lambda table: unplaced if table.rows.data_ptr() == eager_rows else recorded,
    )
    ids, values = torch.zeros(4, dtype=torch.int64, device=device), torch.zeros(4, 3, device=device)

    def step(table: Tensor, optimizer: RowAdamW) -> None:
        prepare_rows(table, ids)
        table.grad = torch.sparse_coo_tensor(ids[None], values, table.shape, check_invariants=False)
        optimizer.step()

    generator = torch.Generator().manual_seed(5)
    for number in range(12):
        ids.copy_(torch.randint(12, (4,), generator=generator))
        values.copy_(torch.randn(4, 3, generator=generator))
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + number)
        if number in (2, 4):
            for optimizer in optimizers:
                optimizer.catch_up()
        step(eager_table, optimizers[0])
        if number == 2:
            with optimizers[1].captured_step():
                recorded.capturing = True
                step(replayed_table, optimizers[1])
                recorded.capturing = False
            assert len(recorded.calls) == (1 if lazy else 3)
        if number < 2:
            step(replayed_table, optimizers[1])
        else:
            with optimizers[1].replayed_step():
                for call in recorded.calls:
                    call()
    for optimizer in optimizers:
        optimizer.catch_up()
    assert torch.equal(eager_table.detach(), replayed_table.detach())
    states = [optimizer.state[optimizer.param_groups[0]["params"][0]] for optimizer in optimizers]
    assert states[0]["step"] == states[1]["step"] == 12
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items() if isinstance(value, Tensor))


def test_a_step_whose_numbers_come_from_the_host_is_not_captured() -> None:
    table = torch.nn.Parameter(torch.randn(3, 2, dtype=torch.float64))
    optimizer = RowAdamW([{"params": [table], "rows": True}])
    table.grad = torch.ones_like(table)
    optimizer.step()
    with (
        pytest.raises(RuntimeError, match=r"table \(3, 2\) in torch.float64 on cpu cannot be captured"),
        optimizer.captured_step(),
    ):
        pass


def test_tables_of_a_group_are_captured_with_one_history(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr("peerlm.optim.row_adamw._kernels", lambda table: row_steps)
    tables = [torch.nn.Parameter(torch.randn(3, 2, device=device)) for _ in range(2)]
    optimizer = RowAdamW([{"params": tables, "rows": True}], betas=(0.5, 0.9))

    def step(some: list[torch.nn.Parameter]) -> None:
        for table in some:
            table.grad = torch.sparse_coo_tensor(
                torch.tensor([[1]], device=device), torch.ones(1, 2, device=device), (3, 2), check_invariants=True
            )
        optimizer.step()
        optimizer.zero_grad()

    step(tables)
    prepare_rows(tables[0], None)
    starts = [optimizer.state[table]["history_start"] for table in tables]
    assert starts == [1, 0]
    with optimizer.captured_step():
        pass
    starts = [optimizer.state[table]["history_start"] for table in tables]
    assert starts == [1, 1]
    step(tables[:1])
    with pytest.raises(RuntimeError, match="different numbers of steps"), optimizer.captured_step():
        pass


def test_a_learning_rate_in_a_tensor_is_not_asked_for(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    def asked(self: Tensor) -> float:
        raise AssertionError("a host waits for a device")

    monkeypatch.setattr("peerlm.optim.row_adamw._kernels", lambda table: row_steps)
    monkeypatch.setattr("peerlm.optim.group_checks._is_on_device", lambda rate: isinstance(rate, Tensor))
    start = torch.randn(6, 3)
    tables = [torch.nn.Parameter(start.to(device, copy=True)) for _ in range(2)]
    ids = torch.tensor([[1, 4, 1]], device=device)
    rates = (0.25, torch.tensor(0.25, device=device))
    for table, rate in zip(tables, rates, strict=True):
        optimizer = RowAdamW([{"params": [table], "rows": True}], lr=rate, lazy=True)  # type: ignore[arg-type]
        with monkeypatch.context() as patch:
            if isinstance(rate, Tensor):
                patch.setattr(Tensor, "__float__", asked)
                patch.setattr(Tensor, "item", asked)
            for number in range(3):
                values = torch.full((3, 3), 1.0 + number, device=device)
                table.grad = torch.sparse_coo_tensor(ids, values, table.shape, check_invariants=False)
                optimizer.step()
    assert torch.equal(*tables)
    assert not torch.equal(tables[0].detach().cpu(), start)
