"""Rows of 8 bits in training: their scales, their rounding, and RowAdamW that updates them in the backward pass."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from peerlm import PEER
from peerlm.ops.cpu import native
from peerlm.ops.cpu import rows as native_rows
from peerlm.ops.row_formats import largest_number
from peerlm.ops.row_updates import RowState, RowStep
from peerlm.optim import RowAdamW, parameter_groups, row_step
from peerlm.optim.catch_up import RateHistory, catch_up_rules
from peerlm.optim.scaled_rows import following_scales, narrow

needs_native = pytest.mark.skipif(bool(native.unavailable()), reason=f"no native kernels: {native.unavailable()}")
DTYPES = pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "float8"])
SIDES = pytest.mark.parametrize(
    "kernels", [pytest.param(native_rows, marks=needs_native), row_step], ids=["native", "definition"]
)
N = 40


def table_of(
    dtype: torch.dtype,
    row_shape: tuple[int, ...] = (2, 31),
    *,
    first: bool = False,
    row_wise: bool = True,
    lazy: bool = False,
) -> RowState:
    wide = torch.randn(N, *row_shape)
    scales = wide.abs().amax(-1) / largest_number(dtype)
    steps = None if lazy else torch.zeros(N, dtype=torch.int32)
    return RowState(
        rows=narrow(wide, scales, dtype, None),
        exp_avg=torch.zeros_like(wide) if first else None,
        exp_avg_sq=torch.zeros(N) if row_wise else torch.zeros_like(wide),
        moments_step=steps,
        weights_step=None if steps is None else steps.clone(),
        scales=scales,
    )


def twin(table: RowState) -> RowState:
    return RowState(**{name: None if value is None else value.clone() for name, value in vars(table).items()})


def step_of(number: int, *, learning_rate: float = 1e-2, beta1: float = 0.0, seed: int | None = 3) -> RowStep:
    return RowStep(
        step=number, learning_rate=learning_rate, weight_decay=0.1, beta1=beta1, beta2=0.95, eps=1e-8, seed=seed
    )


def numbers(table: RowState) -> Tensor:
    assert table.scales is not None
    return table.rows.float() * table.scales[..., None]


@needs_native
@DTYPES
@pytest.mark.parametrize("kind", [{}, {"row_wise": False}, {"first": True, "lazy": True}], ids=str)
def test_native_updates_are_those_of_the_definition(kind: dict[str, Any], dtype: torch.dtype) -> None:
    ours = table_of(dtype, **kind)
    expected = twin(ours)
    beta1 = 0.9 if kind.get("first") else 0.0
    for number in range(1, 25):
        gradient = torch.randn(N, 2, 31)
        for kernels, table in ((native_rows, ours), (row_step, expected)):
            kernels.update_rows(table, None, gradient, step_of(number, beta1=beta1))
    # A rounding may tip one decision at random, and no step after it is then the same
    assert ((numbers(ours) - numbers(expected)).abs().amax(-1) > 1e-6).sum() <= 2
    assert ours.scales is not None
    torch.testing.assert_close(ours.scales, expected.scales, rtol=1e-2, atol=0)


@DTYPES
@SIDES
def test_a_row_that_outgrows_its_scale_gets_a_larger_one(kernels: Any, dtype: torch.dtype) -> None:
    table = table_of(dtype)
    before = numbers(table)
    gradient = torch.zeros(N, 2, 31)
    gradient[:, 1, 5] = -1.0  # one vector of each row, and one number of it by ten at once
    kernels.update_rows(table, None, gradient, step_of(1, learning_rate=10.0 / 62**0.5, seed=None))
    wanted = before.clone() * (1 - 1.0 / 62**0.5)
    wanted[:, 1, 5] += 10.0
    assert table.scales is not None
    half_a_step = table.scales[..., None] * (0.5 if dtype == torch.int8 else 16.0)  # near the largest number, 448
    assert ((numbers(table) - wanted).abs() <= half_a_step * 1.001).all()
    assert table.rows.float().abs().max() <= largest_number(dtype)


@DTYPES
def test_scales_stay_until_rows_leave_them(dtype: torch.dtype) -> None:
    wide, scales = torch.tensor([[[1.0, -2.0]]]), torch.tensor([[2.0 / largest_number(dtype)]])
    assert torch.equal(following_scales(wide, scales, dtype), scales)
    assert torch.equal(following_scales(wide * 0.5, scales, dtype), scales)
    for factor in (1.01, 0.4):
        torch.testing.assert_close(following_scales(wide * factor, scales, dtype), scales * factor * 1.125)
    assert following_scales(wide * 0, scales, dtype).item() == 0


@DTYPES
def test_rounding_is_right_in_the_mean(dtype: torch.dtype) -> None:
    value = torch.linspace(-1, 1, 2001).view(1, 1, -1)
    scale = torch.tensor([[1 / largest_number(dtype)]])
    bits = (torch.arange(256) * 256 + 128).view(-1, 1, 1).expand(256, 1, 2001)  # all sixteen bits, in 256 steps
    rounded = narrow(value.expand(256, 1, -1), scale.expand(256, 1), dtype, bits).float() * scale[..., None]
    spacing = scale.item() * (1 if dtype == torch.int8 else 32)
    assert ((rounded - value).abs() < spacing * 1.001).all()
    assert ((rounded.mean(0, keepdim=True) - value).abs() < spacing / 200).all()


@DTYPES
@SIDES
def test_gradients_that_are_no_numbers_make_their_vectors_so(kernels: Any, dtype: torch.dtype) -> None:
    table = table_of(dtype, row_wise=False)
    gradient = torch.zeros(1, 2, 31)
    gradient[0, 1, 3] = float("nan")
    kernels.update_rows(table, torch.tensor([7]), gradient, step_of(1))
    assert numbers(table)[7, 1].isnan().all()
    assert numbers(table).isfinite().sum() == table.rows.numel() - 31


@DTYPES
@SIDES
def test_stale_rows_decay_by_their_scales(kernels: Any, dtype: torch.dtype) -> None:
    table = table_of(dtype)
    before, codes = numbers(table), table.rows.clone()
    history = RateHistory.empty(0)
    for _ in range(10):
        history = history.append(1e-1, 0.1)
    rules = catch_up_rules(history, torch.tensor([0]), 0.0, 0.95)
    kernels.catch_up_rows(table, torch.tensor([3, 9]), rules, step_of(10))
    wanted = before.clone()
    wanted[[3, 9]] *= 0.99**10
    torch.testing.assert_close(numbers(table), wanted)
    assert torch.equal(table.rows.view(torch.uint8), codes.view(torch.uint8))
    assert table.weights_step is not None
    assert table.weights_step.nonzero().flatten().tolist() == [3, 9]


@needs_native
@DTYPES
def test_threads_do_not_change_bits(dtype: torch.dtype) -> None:
    one = table_of(dtype)
    two = twin(one)
    gradient = torch.randn(N, 2, 31)
    native_rows.update_rows(one, None, gradient, step_of(1))
    torch.set_num_threads(3)
    try:
        native_rows.update_rows(two, None, gradient, step_of(1))
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one.rows.view(torch.uint8), two.rows.view(torch.uint8))
    assert one.scales is not None
    assert torch.equal(one.scales, two.scales)


def small_layer(row_format: str = "int8") -> PEER:
    torch.manual_seed(0)
    return PEER(16, num_experts=64, heads=2, experts_per_head=4, key_dim=8, row_format=row_format)


def optimizer_for(layer: PEER) -> RowAdamW:
    return RowAdamW(parameter_groups(layer), lr=1e-2, betas=(0.0, 0.98), row_wise=True, fused=True)


@needs_native
def test_a_layer_learns_with_rows_of_8_bits_nearly_as_with_floats() -> None:
    x = torch.randn(64, 16)
    target = torch.randn(64, 16)
    losses = {}
    for row_format in ("float32", "int8"):
        layer = small_layer(row_format)
        if row_format == "int8":
            layer.experts.train_in_place()
        optimizer = optimizer_for(layer)
        for _ in range(60):
            loss = (layer(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[row_format] = loss.item()
    untrained = (small_layer()(x) - target).square().mean().item()
    assert losses["float32"] < 0.5 * untrained
    assert abs(losses["int8"] - losses["float32"]) < 0.05 * untrained


@needs_native
def test_rows_of_8_bits_are_trained_where_nothing_below_them_is() -> None:
    layer = small_layer()
    layer.experts.train_in_place()
    layer.product_keys.requires_grad_(False)
    optimizer = optimizer_for(layer)
    before = layer.experts.rows.clone()
    layer(torch.randn(8, 16)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(layer.experts.rows, before)


@needs_native
def test_what_is_not_trained_in_place_stays_as_it_is() -> None:
    layer = small_layer()
    optimizer = optimizer_for(layer)
    before = layer.experts.rows.clone()
    layer(torch.randn(8, 16)).square().sum().backward()
    optimizer.step()
    assert torch.equal(layer.experts.rows, before)
    assert not layer.experts.requires_grad


def test_rows_of_8_bits_without_their_optimizer_are_refused() -> None:
    layer = small_layer()
    layer.experts.train_in_place()
    with pytest.raises(RuntimeError, match=r"rows in int8 are trained by RowAdamW\(fused=True\) alone"):
        layer(torch.randn(8, 16))
    layer.eval()(torch.randn(8, 16))
    with pytest.raises(ValueError, match="int8 has no gradient: pass fused=True"):
        RowAdamW(layer.parameters(), betas=(0.0, 0.98))
    with pytest.raises(ValueError, match="betas with beta1 = 0"):
        RowAdamW(layer.parameters(), fused=True)
    with pytest.raises(ValueError, match=r"rows in float32 have gradients: use requires_grad_\(True\)"):
        small_layer("float32").experts.train_in_place()


@needs_native
def test_another_backend_says_that_it_does_not_train_them() -> None:
    layer = small_layer()
    layer.experts.train_in_place()
    layer.experts.backend = "reference"
    optimizer_for(layer)
    with pytest.raises(ValueError, match="the definition does not train rows of 8 bits"):
        layer(torch.randn(8, 16))


@needs_native
def test_a_copy_and_a_saved_state_go_on_alike() -> None:
    x = [torch.randn(32, 16) for _ in range(6)]
    layer = small_layer()
    layer.experts.train_in_place()
    optimizer = optimizer_for(layer)

    def steps(layer: PEER, optimizer: RowAdamW, batches: list[Tensor]) -> None:
        for batch in batches:
            layer(batch).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    steps(layer, optimizer, x[:3])
    twin_layer = copy.deepcopy(layer)
    twin_optimizer = optimizer_for(twin_layer)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in ((layer, optimizer), (twin_layer, twin_optimizer)):
        steps(*each, x[3:])
    for name, value in layer.state_dict().items():
        assert torch.equal(value, twin_layer.state_dict()[name]), name
