"""Tables in every mode of RowAdamW, for tests of kernels against `optim/row_step.py`."""

from typing import Any

import torch
from torch import Tensor

from peerlm.ops.row_updates import RowState, RowStep
from peerlm.testing import assert_within_budget

NOW = 150
KINDS: dict[str, dict[str, Any]] = {
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
