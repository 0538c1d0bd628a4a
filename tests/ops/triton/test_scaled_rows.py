"""Rows of 8 bits trained by Triton kernels, against `optim/row_step.py` and `optim/scaled_rows.py`."""

from typing import Any

import pytest
import torch
from torch import Tensor

from peerlm import PEER
from peerlm.ops.reference_operators import KERNELS
from peerlm.ops.row_formats import largest_number
from peerlm.ops.row_updates import RowState
from peerlm.ops.triton import fused_update, row_steps
from peerlm.ops.triton.fused_update import update_by_gradients
from peerlm.optim import RowAdamW, parameter_groups, row_step
from peerlm.optim.catch_up import RateHistory, catch_up_rules
from peerlm.optim.scaled_rows import narrow

from ...row_tables import NOW, copy_of, random_table, step_of, tensors
from .placed_tables import placed_on, read_back

DTYPES = pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "float8"])


def scaled_table(dtype: torch.dtype, row_shape: tuple[int, ...], **kind: Any) -> RowState:
    wide = random_table(row_shape, **{"first": False, "row_wise": True, **kind})
    scales = wide.rows.abs().amax(-1) / largest_number(dtype)
    return RowState(**{**vars(wide), "rows": narrow(wide.rows, scales, dtype, None), "scales": scales})


def numbers(table: RowState) -> Tensor:
    assert table.scales is not None
    return table.rows.float() * table.scales[..., None]


def mixtures(row_shape: tuple[int, ...], tokens: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, grad_y, ids and coefficients, 6 per token; row 7 has most of the entries."""
    ids = torch.randint(0, 9, (tokens, 6))
    ids[1:, 1:] = 7
    ids[0, 0] = 39
    parts, width = row_shape
    return torch.randn(tokens, width), torch.randn(tokens, width), ids, torch.randn(tokens, 6, parts)


@DTYPES
@pytest.mark.parametrize(
    ("kind", "row_shape", "seed", "tokens"),
    [
        ({}, (2, 20), 5, 3),
        ({}, (2, 5), None, 50),
        ({"row_wise": False}, (3, 9), 5, 3),
        ({"first": True, "lazy": True}, (2, 20), 5, 3),
    ],
    ids=str,
)
def test_a_fused_update_is_that_of_the_definition(
    kind: dict[str, Any],
    row_shape: tuple[int, int],
    seed: int | None,
    tokens: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    before = scaled_table(dtype, row_shape, **kind)
    expected, found = copy_of(before), placed_on(device, before)
    again, step = copy_of(found), step_of(before, seed=seed)
    x, grad_y, ids, coefficients = mixtures(row_shape, tokens)
    rows, gradient = KERNELS["gradients_by_row"](x, grad_y, ids, coefficients, 40)  # type: ignore[misc]
    row_step.update_rows(expected, rows, gradient.view(-1, *row_shape), step)
    monkeypatch.setattr(fused_update, "tile_of_entries", lambda dim: (16, 16))  # a vector takes several turns
    for table in (found, again) if tokens > 3 else (found,):
        update_by_gradients(table, step, *(each.to(device) for each in (x, grad_y, ids, coefficients)))
    for name, value in tensors(found).items() if tokens > 3 else ():
        assert torch.equal(value.view(torch.uint8), tensors(again)[name].view(torch.uint8)), name
    found = read_back(found)
    assert found.scales is not None
    assert expected.scales is not None
    torch.testing.assert_close(found.scales, expected.scales, rtol=1e-5, atol=0)
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-4)
    for name in ("moments_step", "weights_step"):
        assert getattr(expected, name) is None or torch.equal(getattr(found, name), getattr(expected, name))
    # A rounding may tip one decision at random
    spacing = expected.scales[..., None] * (1 if dtype == torch.int8 else 32)
    apart = (numbers(found) - numbers(expected)).abs()
    assert (apart <= spacing * 1.001).all()
    assert (apart > 1e-4 * spacing).sum() <= 2
    still = sorted(set(range(40)) - set(ids.flatten().tolist()))
    assert torch.equal(found.rows[still].view(torch.uint8), before.rows[still].view(torch.uint8))
    assert not torch.equal(found.rows[7].view(torch.uint8), before.rows[7].view(torch.uint8))


@DTYPES
@pytest.mark.parametrize("value", [1e4, 1e-30, float("nan"), float("inf")])
def test_vectors_that_leave_their_scales_are_as_defined(value: float, dtype: torch.dtype, device: torch.device) -> None:
    before = scaled_table(dtype, (2, 20), lazy=True)
    assert before.scales is not None
    before.scales[7, 1] *= value if value < 1 else 1.0
    expected, found, step = copy_of(before), placed_on(device, before), step_of(before)
    ids, gradient = torch.tensor([[7], [3]]), torch.randn(2, 20)
    gradient[0, 5] = value
    ones = torch.ones(2, 1, 2)
    ones[1, 0, 1] = 0.0
    wide = torch.stack([gradient, gradient * ones[:, 0, 1:]], dim=1)
    row_step.update_rows(expected, ids[:, 0], wide, step)
    update_by_gradients(found, step, *(each.to(device) for each in (gradient, gradient, ids, ones)))
    found = read_back(found)
    assert found.scales is not None
    torch.testing.assert_close(found.scales, expected.scales, rtol=1e-5, atol=0, equal_nan=True)
    assert torch.equal(numbers(found).isnan(), numbers(expected).isnan())


@DTYPES
def test_stale_rows_decay_by_their_scales(dtype: torch.dtype, device: torch.device) -> None:
    before = scaled_table(dtype, (3, 5))
    expected, found, step = copy_of(before), placed_on(device, before), step_of(before)
    history = RateHistory.empty(0)
    for number in range(NOW):
        history = history.append(1e-1 / (1 + number), 0.1)
    rules = catch_up_rules(history, torch.arange(NOW), step.beta1, step.beta2)
    stale = row_step.rows_behind(before, None, NOW)
    row_step.catch_up_rows(expected, stale, rules, step)
    row_steps.catch_up_entries(
        found,
        torch.cat([stale, stale, torch.tensor([-1])]).to(device),
        row_steps.place_rules(rules, step.eps, device),
        step,
    )
    found = read_back(found)
    torch.testing.assert_close(found.scales, expected.scales)
    assert not torch.equal(found.scales, before.scales)  # type: ignore[arg-type]
    assert torch.equal(found.rows.view(torch.uint8), before.rows.view(torch.uint8))
    assert torch.equal(found.weights_step, expected.weights_step)  # type: ignore[arg-type]


def test_a_layer_learns_with_rows_of_8_bits(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(
        "peerlm.optim.row_adamw._kernels", lambda table: row_steps
    )  # on a CPU the native ones are first
    torch.manual_seed(0)
    x, target = torch.randn(2, 2, 8, device=device)
    layer = PEER(
        8,
        num_experts=16,
        heads=1,
        experts_per_head=2,
        key_dim=4,
        query_norm="none",
        row_format="int8",
        backend="triton",
    ).to(device)
    layer.experts.train_in_place()
    options = {"betas": (0.0, 0.98), "row_wise": True, "fused": True, "weight_decay": 0.01}
    optimizer = RowAdamW(parameter_groups(layer), lr=3e-2, **options)
    losses = []
    for _ in range(4):
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    with optimizer.captured_step():  # such a step may be captured
        pass


@DTYPES
def test_8_bits_with_a_moment_for_some_columns_are_refused(dtype: torch.dtype, device: torch.device) -> None:
    table = scaled_table(dtype, (2, 20), lazy=True)
    table = RowState(**{**vars(table), "exp_avg_sq": torch.zeros(40, 2, 4)})
    with pytest.raises(
        ValueError, match=r"one second moment for some columns; keep one for each row \(row_wise=True\)"
    ):
        update_by_gradients(table, step_of(table), *mixtures((2, 20)))
