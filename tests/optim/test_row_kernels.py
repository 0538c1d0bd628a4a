"""The native row kernels against `row_step`, built for this machine by the C++ compiler alone."""

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import peerlm
from peerlm.ops.rows import RowStep, RowTable
from peerlm.optim import RowAdamW, row_step
from peerlm.optim.catch_up import MAX_NODES, CatchUpRules, RateHistory, catch_up_rules

CSRC = Path(peerlm.__file__).parent / "csrc"
COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

SOURCE = """
#include "row_adamw.h"
namespace peerlm {
#include "row_adamw.inc"
}
extern "C" bool update(const peerlm::RowAdamWTable* table, const int64_t* ids, int64_t count, const void* gradient,
                       bool bf16, const peerlm::RowAdamWStep* step, int threads) {
  return peerlm::ROW_ADAMW.update_rows(*table, ids, count, gradient, bf16, *step, threads);
}
extern "C" bool catch_up(const peerlm::RowAdamWTable* table, const int64_t* ids, int64_t count,
                         const peerlm::RowCatchUpRules* rules, const peerlm::RowAdamWStep* step, int threads) {
  return peerlm::ROW_ADAMW.catch_up_rows(*table, ids, count, *rules, *step, threads);
}
"""


class Table(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rows", "exp_avg", "exp_avg_sq", "moments_step", "weights_step")),
        *((name, ctypes.c_int64) for name in ("num_rows", "len")),
        *((name, ctypes.c_bool) for name in ("bf16_rows", "bf16_moments", "row_wise")),
    )


class Step(ctypes.Structure):
    _fields_ = (
        ("step", ctypes.c_int32),
        *((name, ctypes.c_double) for name in ("learning_rate", "weight_decay", "beta1", "beta2", "eps")),
        ("stochastic_rounding", ctypes.c_bool),
        ("seed", ctypes.c_uint32),
    )


class Rules(ctypes.Structure):
    _fields_ = (
        ("first_step", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("index", "decay", "num_nodes", "weights", "nodes")),
        ("max_nodes", ctypes.c_int64),
    )


def c_table(table: RowTable) -> Table:
    def address(tensor: Tensor | None) -> int | None:
        return None if tensor is None else tensor.data_ptr()

    return Table(
        address(table.rows),
        address(table.exp_avg),
        address(table.exp_avg_sq),
        address(table.moments_step),
        address(table.weights_step),
        len(table.rows),
        table.rows[0].numel(),
        table.rows.dtype == torch.bfloat16,
        torch.bfloat16 in (table.exp_avg_sq.dtype, None if table.exp_avg is None else table.exp_avg.dtype),
        table.exp_avg_sq.ndim == 1,
    )


def c_step(step: RowStep) -> Step:
    numbers = (step.step, step.learning_rate, step.weight_decay, step.beta1, step.beta2, step.eps)
    return Step(*numbers, step.seed is not None, step.seed or 0)


@pytest.fixture(scope="module", params=[["-march=native"], []], ids=["native", "baseline"])
def native(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """`update_rows` and `catch_up_rows` of row_step.py, done by the kernels."""
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "kernels.cpp").write_text(SOURCE)
    flags = ["-std=c++17", "-O3", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    command = [str(COMPILER), *flags, *request.param, f"-I{CSRC}", "kernels.cpp", "-o", "kernels.so"]
    subprocess.run(command, cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "kernels.so"))
    library.update.restype = library.catch_up.restype = ctypes.c_bool

    def update_rows(table: RowTable, ids: Tensor | None, gradient: Tensor, step: RowStep, threads: int = 2) -> None:
        ids = torch.arange(len(table.rows)) if ids is None else ids
        at = ctypes.c_void_p(ids.data_ptr()), ctypes.c_int64(len(ids)), ctypes.c_void_p(gradient.data_ptr())
        bf16 = ctypes.c_bool(gradient.dtype == torch.bfloat16)
        if not library.update(ctypes.byref(c_table(table)), *at, bf16, ctypes.byref(c_step(step)), threads):
            raise IndexError("row out of range")

    def catch_up_rows(table: RowTable, ids: Tensor, rules: CatchUpRules, step: RowStep, threads: int = 2) -> None:
        arrays = (rules.index, rules.decay, rules.num_nodes, rules.weights, rules.nodes)
        c_rules = Rules(rules.first_step, *(array.data_ptr() for array in arrays), MAX_NODES)
        at = ctypes.c_void_p(ids.data_ptr()), ctypes.c_int64(len(ids)), ctypes.byref(c_rules)
        if not library.catch_up(ctypes.byref(c_table(table)), *at, ctypes.byref(c_step(step)), threads):
            raise IndexError("row out of range")

    return SimpleNamespace(update_rows=update_rows, catch_up_rows=catch_up_rows)


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
) -> RowTable:
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
    return RowTable(
        rows=torch.randn(shape).to(rows),
        exp_avg=exp_avg.to(moments) if first else None,
        exp_avg_sq=exp_avg_sq if row_wise else exp_avg_sq.to(moments),
        moments_step=None if lazy else moments_step,
        weights_step=None if lazy else weights_step,
    )


def tensors(table: RowTable) -> dict[str, Tensor]:
    return {name: value for name, value in vars(table).items() if value is not None}


def twins(table: RowTable) -> tuple[RowTable, RowTable]:
    def clone() -> RowTable:
        copies = {name: value.clone() for name, value in tensors(table).items()}
        return RowTable(**{name: copies.get(name) for name in vars(table)})

    return clone(), clone()


def step_of(table: RowTable, *, seed: int | None = 5, learning_rate: float = 1e-2) -> RowStep:
    beta1 = 0.0 if table.exp_avg is None else 0.9
    return RowStep(
        step=NOW, learning_rate=learning_rate, weight_decay=0.1, beta1=beta1, beta2=0.95, eps=1e-8, seed=seed
    )


def assert_alike(found: RowTable, expected: RowTable) -> None:
    """Equal up to float rounding; in bfloat16 up to one unit, where rounding tips a random decision."""
    for name, value in tensors(expected).items():
        ours = tensors(found)[name]
        if value.dtype == torch.bfloat16:
            apart = (ours.view(torch.int16).int() - value.view(torch.int16).int()).abs()
            assert apart.max() <= 1, name
            assert (apart > 0).float().mean() < 0.01, name
        else:
            torch.testing.assert_close(ours, value, rtol=2e-6, atol=0 if name == "exp_avg_sq" else 2e-7, msg=name)


@pytest.mark.parametrize("row_shape", [(1,), (2, 31), (512,)])
@pytest.mark.parametrize("kind", KINDS)
def test_an_update_is_that_of_the_definition(native: Any, kind: str, row_shape: tuple[int, ...]) -> None:
    found, expected = twins(random_table(row_shape, **KINDS[kind]))
    ids = torch.tensor([0, 3, 7, 8, 39])
    gradient = torch.randn(5, *row_shape).to(found.rows.dtype)
    for functions, table in ((native, found), (row_step, expected)):
        functions.update_rows(table, ids, gradient, step_of(table))
    assert_alike(found, expected)
    functions.update_rows(expected, None, torch.ones_like(expected.rows), step_of(expected))
    native.update_rows(found, None, torch.ones_like(found.rows), step_of(found))
    assert_alike(found, expected)


@pytest.mark.parametrize("row_shape", [(1,), (2, 31), (512,)])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lazy"])
def test_catching_up_is_that_of_the_definition(native: Any, kind: str, row_shape: tuple[int, ...]) -> None:
    found, expected = twins(random_table(row_shape, **KINDS[kind]))
    step = step_of(found)
    history = RateHistory.empty(0)
    for number in range(NOW):
        history = history.append(1e-2 / (1 + number), 0.1)
    assert found.weights_step is not None
    ids = (found.weights_step < NOW).nonzero().flatten()
    rules = catch_up_rules(history, found.weights_step[ids].unique().long(), step.beta1, step.beta2)
    before = found.rows.clone()
    native.catch_up_rows(found, ids, rules, step)
    row_step.catch_up_rows(expected, ids, rules, step)
    assert not torch.equal(found.rows, before)
    assert_alike(found, expected)
    again = found.rows.clone()
    rules.index[-1] = 0  # no rule is for rows that are up to date
    native.catch_up_rows(found, ids, rules, step)
    assert torch.equal(found.rows, again)


@pytest.mark.parametrize("kind", ["plain", "bf16"])
def test_threads_do_not_change_bits(native: Any, kind: str) -> None:
    one, two = twins(random_table((2, 31), **KINDS[kind]))
    gradient = torch.randn(40, 2, 31)
    native.update_rows(one, None, gradient, step_of(one), threads=1)
    native.update_rows(two, None, gradient, step_of(two), threads=3)
    assert all(torch.equal(tensors(one)[name], tensors(two)[name]) for name in tensors(one))


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, 0.0, -0.0, 1e-40])
def test_extreme_values_round_alike(native: Any, value: float, seed: int | None) -> None:
    found, expected = twins(random_table((16,), rows=torch.bfloat16, lazy=True))
    gradient = torch.full((1, 16), value)
    ids = torch.tensor([2])
    for functions, table in ((native, found), (row_step, expected)):
        functions.update_rows(table, ids, gradient, step_of(table, seed=seed))
    torch.testing.assert_close(found.rows[2], expected.rows[2], rtol=0, atol=0.02, equal_nan=True)
    assert (found.rows[2].isnan() == expected.rows[2].isnan()).all()


@pytest.mark.parametrize("row", [-1, 40])
def test_rows_out_of_range_change_nothing(native: Any, row: int) -> None:
    table, before = twins(random_table((4,)))
    with pytest.raises(IndexError):
        native.update_rows(table, torch.tensor([0, row]), torch.ones(2, 4), step_of(table))
    assert torch.equal(table.rows, before.rows)


def test_a_run_of_the_optimizer_is_the_same_run(native: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def outcome() -> Tensor:
        table = torch.nn.Parameter(torch.randn(30, 2, 5, generator=torch.Generator().manual_seed(1)))
        optimizer = RowAdamW([{"params": [table], "rows": True}], lr=1e-2, weight_decay=0.1)
        generator = torch.Generator().manual_seed(2)
        for _ in range(50):
            ids = torch.randint(30, (4,), generator=generator).unique()
            values = torch.randn(len(ids), 2, 5, generator=generator)
            table.grad = torch.sparse_coo_tensor(ids[None], values, table.shape, check_invariants=True)
            optimizer.step()
        optimizer.catch_up()
        return table.detach()

    expected = outcome()
    monkeypatch.setattr("peerlm.optim.row_adamw._kernels", lambda table: native)
    torch.testing.assert_close(outcome(), expected, rtol=0, atol=2e-6)
