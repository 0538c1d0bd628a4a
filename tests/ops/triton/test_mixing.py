"""Mixing of experts and values by Triton's kernels, forward and backward, against float64."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from peerlm.ops import api
from peerlm.ops.functions import ACTIVATIONS
from peerlm.ops.row_formats import quantise
from peerlm.ops.triton import experts, experts_backward, gather, row_gradients, values
from peerlm.ops.triton.runtime import OPERATORS
from peerlm.testing import MixInputs, assert_within_budget, mix_inputs

from ..mixing_cases import assert_kernels_within_budget, draw, in_float32, output_and_gradients
from .guards import Guarded, between_poison

assert_right = partial(assert_kernels_within_budget, backend="triton")
FORMATS = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mixing_equals_float64(activation: str, gated: bool) -> None:
    assert_right(draw(5, 17, 9, 30, gated=gated), activation=activation)


@given(
    tokens=st.integers(0, 4),
    per_token=st.integers(0, 20),
    dim=st.integers(1, 40),
    num_experts=st.integers(1, 50),
    row_format=st.sampled_from(FORMATS),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    gated=st.booleans(),
    row_gradients=st.booleans(),
    seed=st.integers(0, 1000),
)
@example(1, 1, 1, 1, torch.float32, "gelu", False, False, 0)
@example(3, 0, 5, 4, torch.float32, "gelu", True, True, 0)
@example(0, 3, 5, 4, torch.bfloat16, "gelu", True, True, 0)
@settings(max_examples=15, deadline=None)
def test_any_shape(
    tokens: int,
    per_token: int,
    dim: int,
    num_experts: int,
    row_format: torch.dtype,
    activation: str,
    gated: bool,
    row_gradients: bool,
    seed: int,
) -> None:
    drawn = draw(tokens, per_token, dim, num_experts, gated=gated, seed=seed)
    trained = row_format.itemsize > 1  # rows of 8 bits have no gradient: test_scaled_rows.py
    assert_right(drawn, row_format, activation=activation, row_gradients=row_gradients and trained)


@pytest.fixture(params=["held whole", "part by part"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With a program that holds four numbers, rows are read part by part, as very wide ones are."""
    if request.param == "part by part":
        monkeypatch.setattr(gather, "WIDEST", 4)
    return request.param


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("gated", [False, True])
def test_formats_of_rows(gated: bool, row_format: torch.dtype) -> None:
    assert_right(draw(2, 19, 13, 9, gated=gated), row_format)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dim", [1000, gather.WIDEST + 1])
def test_wide_rows(dim: int, gated: bool) -> None:
    assert_right(draw(1, 3, dim, 2, gated=gated))


@pytest.mark.parametrize(("gated", "row_gradients"), [(False, True), (True, False)])
def test_one_expert_for_all(gated: bool, row_gradients: bool) -> None:
    drawn = draw(33, 8, 6, 100, gated=gated, one_expert=True)  # more entries than are summed in one chunk
    actual = assert_right(drawn, row_gradients=row_gradients)
    assert actual["rows"].is_sparse == row_gradients


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activations_of_any_input(activation: str, device: torch.device) -> None:
    """Value and slope for z in -40 .. 40, in parts where they are of one magnitude."""
    z = torch.cat([torch.linspace(-40, 40, 4001), torch.linspace(-2, 2, 1001), torch.tensor([0.0, -0.0, 1e-30])])
    ones = torch.ones_like(z)
    weighted, grad_weights, coefficients = torch.empty_like(z), torch.empty_like(z), torch.empty(len(z), 2)
    arguments = [each.to(device) for each in (ones, z, weighted, grad_weights, coefficients)]
    experts.weigh_neurons(*arguments[:3], 2, activation)
    experts_backward.through_neurons(ones.to(device), *arguments[:2], *arguments[3:], 2, activation)
    found = [each.cpu() for each in arguments[2:]]
    assert torch.equal(found[0], found[1])
    results = [(found[0], found[2][:, 0])]
    for dtype in (torch.float32, torch.float64):
        leaf = z.to(dtype).requires_grad_()
        value = ACTIVATIONS[activation](leaf)
        results.append((value.detach(), *torch.autograd.grad(value.sum(), leaf)))
    for low, high in itertools.pairwise([-40, -5, -3, -2, -1, 0, 1, 3, 6, 40]):
        part = (low <= z) & (z <= high)
        assert_within_budget(*([value[part] for value in result] for result in results))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [1e3, float("inf"), float("nan")])
def test_inputs_that_are_huge_or_not_numbers(activation: str, size: float) -> None:
    inputs = in_float32(draw(3, 5, 20, 7))
    clean = output_and_gradients(inputs, activation=activation, backend="triton")
    with torch.no_grad():
        inputs.x[1].copy_(inputs.x[1].sign() * size)
    actual = output_and_gradients(inputs, activation=activation, backend="triton")
    for name in ("y", "x", "weights"):  # other tokens do not see it
        assert torch.equal(actual[name][[0, 2]], clean[name][[0, 2]])
    plain = output_and_gradients(inputs, activation=activation, backend="reference")
    assert torch.equal(actual["y"].isfinite(), plain["y"].isfinite())
    if size == 1e3:
        torch.testing.assert_close(actual["y"], plain["y"], rtol=1e-5, atol=1e-3)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("row_format", "row_gradients"), [(torch.float32, True), (torch.bfloat16, False)])
@pytest.mark.parametrize(("tokens", "per_token", "dim"), [(0, 3, 5), (3, 0, 5), (1, 1, 1), (5, 19, 17)])
def test_values(tokens: int, per_token: int, dim: int, row_gradients: bool, row_format: torch.dtype) -> None:
    drawn = mix_inputs(tokens, per_token, dim, 12)
    results = []
    for dtype, backend in ((row_format, "triton"), (row_format, "reference"), (torch.float64, "reference")):
        weights = drawn.weights.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        x = drawn.x.detach().to(weights.dtype).requires_grad_()
        rows = drawn.rows.detach()[:, 1].to(dtype).requires_grad_()
        options = {"backend": backend, "row_gradients": row_gradients and backend == "triton"}
        y = api.mix_values(weights, drawn.ids, rows, **options)
        dots = api.dot_values(x, drawn.ids, rows, **options)
        of_y = torch.autograd.grad(y.sum(), (weights, rows))
        of_dots = torch.autograd.grad((dots * dots.detach()).sum(), (x, rows))
        results.append((y.detach(), dots.detach(), *of_y, *of_dots))
    actual = results[0]
    assert actual[0].dtype == row_format
    assert actual[3].is_sparse == actual[5].is_sparse == row_gradients
    if row_gradients:
        assert actual[3]._indices()[0].tolist() == sorted(set(drawn.ids.flatten().tolist()))
    assert_within_budget(*results)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("bad_id", [-2, 5, 2**62, -(2**63)])
def test_an_id_of_no_row_makes_its_token_nan_and_nothing_else(bad_id: int) -> None:
    inputs = in_float32(draw(3, 4, 6, 5))
    right = output_and_gradients(inputs, backend="triton")
    inputs.ids[1, 2] = bad_id
    found = output_and_gradients(inputs, backend="triton")
    for name in ("y", "x"):
        assert found[name][1].isnan().all()
    assert found["weights"][1].isnan().tolist() == [False, False, True, False]
    for name in ("y", "x", "weights"):
        assert torch.equal(found[name][[0, 2]], right[name][[0, 2]])
    assert found["rows"].isfinite().all()
    value = api.mix_values(inputs.weights, inputs.ids, inputs.rows[:, 0], backend="triton")
    assert value.isnan().all(dim=1).tolist() == [False, True, False]
    assert value.isnan().any(dim=1).tolist() == [False, True, False]
    dots = api.dot_values(inputs.x, inputs.ids, inputs.rows[:, 0], backend="triton")
    assert dots.isnan().nonzero().tolist() == [[1, 2]]


@pytest.mark.usefixtures("way")
def test_the_same_bits_in_every_run_and_every_batch() -> None:
    inputs = in_float32(draw(6, 17, 9, 9, gated=True))
    first, second = (output_and_gradients(inputs, backend="triton") for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name])
    for some in ([2], [5, 0, 3]):
        x, weights, ids = inputs.x[some], inputs.weights[some], inputs.ids[some]
        assert torch.equal(api.mix_experts(x, weights, ids, inputs.rows, backend="triton"), first["y"][some])


class Counted:
    """A kernel that notes its launches."""

    def __init__(self, kernel: Any, launched: list[Any]):
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid: Any) -> Any:
        self.launched.append(grid)
        return self.kernel[grid]


@pytest.mark.parametrize(("per_token", "dim", "parts"), [(33, 13, 2), (16, 8, 3), (65, 1, 2)])
def test_few_tokens_have_the_bits_of_many(
    per_token: int, dim: int, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they are few, each group of a token's entries has a program of its own."""
    inputs = in_float32(draw(2, per_token, dim, 7, gated=parts == 3))
    arguments = [tensor.detach() for tensor in inputs.arguments()]
    found, launched = [], []
    monkeypatch.setattr(experts, "_add_groups", Counted(experts._add_groups, launched))
    for few in (2, 1):
        monkeypatch.setattr(experts, "_FEW_TOKENS", few)
        with Guarded() as guards:
            found.append(experts.mix_experts(*arguments, None, "gelu", False))
        guards.assert_kept()
    assert len(launched) == (per_token > 32)
    for few, many in zip(*found, strict=True):
        assert torch.equal(few, many)


def arguments_of_kernels(dim: int, parts: int) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """The function behind each operator, and what it is called with."""
    inputs = in_float32(draw(5, 3, dim, 7, gated=parts == 3))
    x, weights, ids, rows = (tensor.detach() for tensor in inputs.arguments())
    _, hidden = experts.mix_experts(x, weights, ids, rows, None, "gelu", False)
    coefficients = torch.randn(5, 3, parts)
    return {
        "mix_experts": (experts.mix_experts, (x, weights, ids, rows, None, "gelu", False)),
        "mix_experts_backward": (
            experts_backward.mix_experts_backward,
            (x, weights, ids, hidden, rows, None, "gelu"),
        ),
        "mix_values": (values.mix_values, (weights, ids, rows[:, 0].contiguous(), False)),
        "mix_values_backward": (values.mix_values_backward, (x, weights, ids, rows[:, 0].contiguous())),
        "dot_values": (values.dot_values, (x, ids, rows[:, 0].contiguous(), False)),
        "row_gradients": (row_gradients.row_gradients, (x, x + 1, ids, coefficients, 7)),
        "padded_gradients": (row_gradients.padded_gradients, (x, x + 1, ids, coefficients, 7)),
    }


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("parts", [2, 3])
def test_nothing_beside_the_tensors_is_read_or_written(parts: int) -> None:
    for name, (function, arguments) in arguments_of_kernels(7, parts).items():
        expected = function(*arguments)
        with Guarded() as guards:
            found = function(*(between_poison(a) if isinstance(a, Tensor) else a for a in arguments))
        if guards.given:
            guards.assert_kept()
        expected, found = (each if isinstance(each, tuple) else (each,) for each in (expected, found))
        for f, e in zip(found, expected, strict=True):
            assert torch.equal(f, e), name
            assert not f.isnan().any(), name


@pytest.mark.parametrize(("parts", "row_format"), [(2, torch.float32), (3, torch.bfloat16), (2, torch.int8)])
def test_operators_are_as_pytorch_wants_them(parts: int, row_format: torch.dtype) -> None:
    ops = OPERATORS.ops
    inputs = in_float32(draw(3, 2, 6, 5, gated=parts == 3))
    rows, scales = inputs.rows.detach().to(row_format), None
    if row_format == torch.int8:
        rows, scales = quantise(inputs.rows.detach(), row_format)
    else:
        rows.requires_grad_()
    arguments = inputs.x, inputs.weights, inputs.ids, rows, scales, "gelu"
    torch.library.opcheck(ops.mix_experts.default, (*arguments, False))
    y, hidden = ops.mix_experts(*arguments, False)
    plain = [each.detach() if isinstance(each, Tensor) else each for each in arguments]
    torch.library.opcheck(ops.mix_experts_backward.default, (y.detach(), *plain[1:3], hidden.detach(), *plain[3:]))


def test_operators_of_values_are_as_pytorch_wants_them() -> None:
    inputs = in_float32(draw(3, 2, 6, 5))
    rows = inputs.rows.detach()[:, 0].bfloat16().contiguous().requires_grad_()
    torch.library.opcheck(OPERATORS.ops.mix_values.default, (inputs.weights, inputs.ids, rows, False))
    torch.library.opcheck(OPERATORS.ops.dot_values.default, (inputs.x, inputs.ids, rows, False))
    arguments = inputs.x.detach(), inputs.weights.detach(), inputs.ids, rows.detach()
    torch.library.opcheck(OPERATORS.ops.mix_values_backward.default, arguments)


@pytest.mark.filterwarnings("default")  # torch.compile warns of what it does
def test_compiled_in_one_graph_mixing_has_the_same_bits() -> None:
    torch._dynamo.reset()
    inputs = in_float32(draw(4, 5, 7, 9, gated=True))
    compiled = torch.compile(partial(api.mix_experts, backend="triton"), fullgraph=True, backend="aot_eager")
    results = []
    for mix in (partial(api.mix_experts, backend="triton"), compiled):
        y = mix(*inputs.arguments())
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), inputs.leaves())])
    for found, right in zip(*results, strict=True):
        assert torch.equal(found, right)


def test_rows_that_lie_beyond_the_31st_bit_of_an_offset() -> None:
    """Of two gigabytes, of which the system gives only the pages that are touched."""
    num_rows, dim = 2**21 + 1, 512
    rows = torch.from_numpy(np.zeros((num_rows, 2, dim), np.int8))
    scales = torch.from_numpy(np.zeros((num_rows, 2), np.float32))
    assert rows[-1].data_ptr() - rows.data_ptr() >= 2**31
    inputs = in_float32(draw(2, 3, dim, 3))
    rows[-3:], scales[-3:] = quantise(inputs.rows.detach(), torch.int8)
    arguments = MixInputs(x=inputs.x, weights=inputs.weights, ids=inputs.ids + num_rows - 3, rows=rows)
    few = MixInputs(x=inputs.x, weights=inputs.weights, ids=inputs.ids, rows=rows[-3:])
    found = output_and_gradients(arguments, scales, backend="triton")
    for name, right in output_and_gradients(few, scales[-3:], backend="triton").items():
        assert torch.equal(found[name], right)


@pytest.mark.usefixtures("way")
def test_a_hole_adds_nothing_and_its_weight_has_no_gradient() -> None:
    inputs = in_float32(draw(3, 4, 6, 5))
    filled = inputs.ids.clone()
    inputs.ids[1, 2] = inputs.ids[2, 0] = -1
    hole = inputs.ids < 0
    found = output_and_gradients(inputs, backend="triton")
    expected = output_and_gradients(inputs, backend="reference")
    assert bool((found["weights"][hole] == 0).all())
    torch.testing.assert_close(found, expected)
    dots = api.dot_values(inputs.x, inputs.ids, inputs.rows[:, 0], backend="triton")
    assert bool((dots[hole] == 0).all())
    assert not torch.equal(filled, inputs.ids)
