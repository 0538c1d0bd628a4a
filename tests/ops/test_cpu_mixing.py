"""Native mixing of experts and values, forward and backward, against float64."""

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peerlm.ops import api
from peerlm.ops.cpu import native
from peerlm.ops.functions import ACTIVATIONS
from peerlm.ops.row_formats import quantise
from peerlm.testing import MixInputs, assert_within_budget, mix_inputs, relative_error

from .mixing_cases import assert_kernels_within_budget, draw, in_float32, output_and_gradients, widened

pytestmark = pytest.mark.skipif(bool(native._reason), reason=native._reason)

assert_native_within_budget = partial(assert_kernels_within_budget, backend="cpu")
AWKWARD_DIMS = [1, 7, 16, 17, 64, 100]
AWKWARD_COUNTS = [1, 4, 15, 16, 17, 33, 70]


@pytest.mark.parametrize("row_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mixing_equals_float64(activation: str, gated: bool, row_dtype: torch.dtype) -> None:
    for dim, per_token in zip(AWKWARD_DIMS, AWKWARD_COUNTS, strict=False):
        assert_native_within_budget(draw(21, per_token, dim, 30, gated=gated), row_dtype, activation=activation)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dim", AWKWARD_DIMS)
@pytest.mark.parametrize("per_token", AWKWARD_COUNTS)
def test_awkward_sizes(per_token: int, dim: int, gated: bool) -> None:
    assert_native_within_budget(draw(21, per_token, dim, 11, gated=gated))


@given(
    tokens=st.integers(0, 30),
    per_token=st.integers(1, 70),
    dim=st.integers(1, 130),
    num_experts=st.integers(1, 5000),
    row_format=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    gated=st.booleans(),
    seed=st.integers(0, 1000),
)
@example(19, 70, 1, 70, torch.float32, "gelu_tanh", False, 100)  # sums of slopes near 1 that cancel
@settings(max_examples=60)
def test_any_shape(
    tokens: int,
    per_token: int,
    dim: int,
    num_experts: int,
    row_format: torch.dtype,
    activation: str,
    gated: bool,
    seed: int,
) -> None:
    drawn = draw(tokens, per_token, dim, num_experts, gated=gated, seed=seed)
    assert_native_within_budget(drawn, row_format, activation=activation)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("row_gradients", [False, True])
def test_one_expert_for_all(row_gradients: bool, gated: bool) -> None:
    drawn = draw(63, 8, 64, 100, gated=gated, one_expert=True)
    actual = assert_native_within_budget(drawn, row_gradients=row_gradients)
    assert actual["rows"].is_sparse == row_gradients


def test_repeated_ids_count_each_time() -> None:
    inputs = draw(6, 12, 20, 3)
    assert all(len(set(row)) < len(row) for row in inputs.ids.tolist())
    assert_native_within_budget(inputs)


@pytest.mark.parametrize("row_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_row_gradients_are_the_dense_ones(gated: bool, row_dtype: torch.dtype) -> None:
    inputs = in_float32(draw(17, 9, 33, 400, gated=gated), row_dtype)
    dense = output_and_gradients(inputs, backend="cpu")
    sparse = output_and_gradients(inputs, backend="cpu", row_gradients=True)
    rows = sparse.pop("rows")
    assert rows.is_sparse
    assert rows.is_coalesced()
    assert rows.dtype == row_dtype
    assert rows.indices()[0].tolist() == sorted(set(inputs.ids.flatten().tolist()))
    assert torch.equal(rows.to_dense(), dense["rows"])
    for name, value in sparse.items():
        assert torch.equal(value, dense[name]), name


@pytest.mark.parametrize("gated", [False, True])
def test_row_gradients_of_the_definition(gated: bool) -> None:
    inputs = draw(17, 9, 33, 400, gated=gated)
    dense = output_and_gradients(inputs, backend="reference")
    sparse = output_and_gradients(inputs, backend="reference", row_gradients=True)
    assert sparse["rows"].is_sparse
    for name, value in sparse.items():
        torch.testing.assert_close(value.to_dense(), dense[name], msg=name)


def test_row_gradients_of_a_table_used_twice_add_up() -> None:
    inputs, other = (in_float32(draw(7, 5, 12, 50, seed=seed)) for seed in (0, 1))
    gradients = []
    for row_gradients in (False, True):
        rows = inputs.rows.detach().clone().requires_grad_()
        for each in (inputs, other):
            y = api.mix_experts(each.x, each.weights, each.ids, rows, backend="cpu", row_gradients=row_gradients)
            y.square().sum().backward()
        gradients.append(rows.grad)
    assert gradients[1].is_sparse
    assert torch.equal(gradients[1].to_dense(), gradients[0])


@pytest.mark.parametrize("gated", [False, True])
def test_bfloat16_rows_against_those_before_rounding(gated: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 3 if gated else 2, 256, generator=generator)
    rows[:, ::2] *= 256**-0.5
    drawn = mix_inputs(32, 32, 256, 300)
    single = MixInputs(x=drawn.x.float(), weights=drawn.weights.float(), ids=drawn.ids, rows=rows.bfloat16())
    y = api.mix_experts(*single.arguments(), backend="cpu")
    exact, rounded = (
        api.mix_experts(*widened(single, rows=table).arguments(), backend="reference") for table in (rows, single.rows)
    )
    lost = relative_error(rounded, exact)  # by rounding the rows, however exactly it goes on
    assert 2**-8 > lost > 100 * torch.finfo(torch.float32).eps
    assert relative_error(y, exact) == pytest.approx(lost, rel=0.01)


@pytest.mark.parametrize("dim", [1, 33, 256])
@pytest.mark.parametrize("gated", [False, True])
def test_int8_rows(gated: bool, dim: int) -> None:
    """Against the rows that are stored, and, with entries spread evenly, against those before quantisation."""
    generator = torch.Generator().manual_seed(0)
    rows = 2 * torch.rand(300, 3 if gated else 2, dim, generator=generator, dtype=torch.float64) - 1
    rows[:, ::2] *= (3 / dim) ** 0.5
    drawn = widened(mix_inputs(32, 32, dim, 300), rows)
    actual = assert_native_within_budget(drawn, torch.int8)
    assert sorted(actual) == ["weights", "x", "y"]
    quantised, scales = quantise(rows.float())
    stored = quantised.double() * scales.double()[..., None]
    before = output_and_gradients(drawn, backend="reference")
    factors = 3 if gated else 2  # vectors, each with its own error, that a result is a product of
    rounding = (
        16 * torch.finfo(torch.float32).eps
    )  # at dim 1 every entry is the largest of its vector, and stored whole
    lost = relative_error(stored, rows)
    for name, value in actual.items():
        assert relative_error(value, before[name]) <= factors * lost + rounding, name
    # Steps are 1 / 127 of the largest; an error is spread evenly over one, as entries are over 254
    assert lost <= 1.01 / 254 + rounding


def test_every_number_of_float8_is_read() -> None:
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    rows = torch.stack([torch.zeros_like(codes), codes]).view(torch.float8_e4m3fn)[None]
    x, weights, ids = torch.zeros(1, len(codes)), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64)
    scales = torch.tensor([[1.0, 2.0]])
    y = api.mix_experts(x, weights, ids, rows, scales, activation="one_plus", backend="cpu")
    assert torch.equal(y[0], 2 * rows[0, 1].float())


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activations_of_any_input(activation: str) -> None:
    """One neuron whose input is z: value and slope for z in -40 .. 40, in parts where they are of one magnitude."""
    z = torch.cat([torch.linspace(-40, 40, 4001), torch.linspace(-2, 2, 1001), torch.tensor([0.0, -0.0, 1e-30])])
    results = []
    for dtype, backend in ((torch.float32, "cpu"), (torch.float32, "reference"), (torch.float64, "reference")):
        x, ones = z[:, None].to(dtype).requires_grad_(), torch.ones(len(z), 1, dtype=dtype)
        ids, rows = torch.zeros(len(z), 1, dtype=torch.int64), torch.ones(1, 2, 1, dtype=dtype)
        y = api.mix_experts(x, ones, ids, rows, activation=activation, backend=backend)
        results.append((y.detach(), *torch.autograd.grad(y.sum(), x)))
    ends = [-40, -5, -3, -2, -1, 0, 1, 3, 6, 40]  # in tails beyond, float64 itself cancels
    for low, high in itertools.pairwise(ends):
        part = ((low <= z) & (z <= high))[:, None]
        assert_within_budget(*([value[part] for value in found] for found in results))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [1e3, 1e20, 3e38, float("inf"), float("nan")])
def test_inputs_that_are_huge_or_not_numbers(activation: str, size: float) -> None:
    inputs = in_float32(draw(3, 5, 20, 7))
    with torch.no_grad():
        inputs.x[1].copy_(inputs.x[1].sign() * size)
    clean = torch.tensor([0, 2])
    actual, plain, exact = (
        output_and_gradients(i, activation=activation, backend=backend)
        for i, backend in ((inputs, "cpu"), (inputs, "reference"), (widened(inputs), "reference"))
    )
    # other tokens do not see it
    assert_within_budget(*({n: found[n][clean] for n in ("y", "x", "weights")} for found in (actual, plain, exact)))
    if size != size:
        assert actual["y"][1].isnan().all()
    if size == 1e3:
        assert_within_budget(actual["y"], plain["y"], exact["y"])


@pytest.mark.parametrize("row_gradients", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_no_tokens(gated: bool, row_gradients: bool) -> None:
    inputs = in_float32(mix_inputs(0, 4, 7, 5, gated=gated))
    results = output_and_gradients(inputs, backend="cpu", row_gradients=row_gradients)
    assert results["y"].shape == (0, 7)
    assert torch.equal(results["rows"].to_dense(), torch.zeros(5, 3 if gated else 2, 7))


@pytest.mark.parametrize("row_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row_gradients", [False, True])
@pytest.mark.parametrize(("tokens", "per_token", "dim"), [(0, 3, 5), (1, 1, 1), (21, 70, 17), (5, 16, 100)])
def test_values(tokens: int, per_token: int, dim: int, row_gradients: bool, row_dtype: torch.dtype) -> None:
    drawn = mix_inputs(tokens, per_token, dim, 40)
    results = []
    for dtype, backend in ((row_dtype, "cpu"), (row_dtype, "reference"), (torch.float64, "reference")):
        weights = drawn.weights.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        values = drawn.rows.detach()[:, 1].to(dtype).requires_grad_()
        options = {"row_gradients": row_gradients} if backend == "cpu" else {}
        y = api.mix_values(weights, drawn.ids, values, backend=backend, **options)
        y.sum().backward()
        results.append({"y": y.detach(), "weights": weights.grad, "rows": values.grad})
    actual = results[0]
    assert actual["y"].dtype == row_dtype
    assert actual["rows"].is_sparse == row_gradients
    if row_gradients:
        assert actual["rows"]._indices()[0].tolist() == sorted(set(drawn.ids.flatten().tolist()))
    assert_within_budget(*results)


@pytest.mark.parametrize("bad_id", [-2, 5, 2**31, 2**62, -(2**63)])
@pytest.mark.parametrize("row_gradients", [False, True])
def test_ids_out_of_range(bad_id: int, row_gradients: bool) -> None:
    inputs = in_float32(mix_inputs(3, 4, 6, 5))
    inputs.ids[2, 3] = bad_id
    message = f"expert id {bad_id} is not in 0 .. 4"
    with pytest.raises(IndexError, match=message):
        api.mix_experts(*inputs.arguments(), backend="cpu", row_gradients=row_gradients)
    with pytest.raises(IndexError, match=message):
        api.mix_values(inputs.weights, inputs.ids, inputs.rows[:, 0], backend="cpu", row_gradients=row_gradients)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3, 5)}, "shapes of weights, ids and y do not fit"),
        ({"x": torch.ones(2, 6)}, "shapes of weights, ids and y do not fit"),
        ({"weights": torch.ones(3, 3)}, "shapes of weights, ids and y do not fit"),
        ({"ids": torch.zeros(2, 4, dtype=torch.int64)}, "shapes of weights, ids and y do not fit"),
        ({"scales": torch.ones(5, 2)}, "rows of 8 bits need scales, and others have none"),
        ({"rows": torch.ones(5, 2, 6, dtype=torch.int8)}, "rows of 8 bits need scales, and others have none"),
        ({"rows": torch.ones(5, 2, 6).char(), "scales": torch.ones(4, 2)}, r"scales must be \(N, parts\)"),
        ({"activation": "tanh"}, "unknown activation tanh"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_kernels_refuse_arguments_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    """`api` refuses them too, for every backend; an operator may be called without it."""
    api.load_backends()
    inputs = in_float32(mix_inputs(3, 4, 6, 5))
    arguments: dict[str, Any] = {
        "x": inputs.x,
        "weights": inputs.weights,
        "ids": inputs.ids,
        "rows": inputs.rows,
        "scales": None,
        "activation": "gelu",
    } | change
    with pytest.raises(ValueError, match=message):
        torch.ops.peerlm.mix_experts(*arguments.values(), False)


def test_group_by_row_sorts_stably() -> None:
    for num_rows, count in ((1, 5), (7, 40), (3000, 5000), (8192, 50_000), (70_000, 40_000), (2**30, 1000), (9, 0)):
        ids = torch.randint(num_rows, (count, 1))
        order, starts, rows = native.group_by_row(ids, num_rows)
        expected, by_row = ids.flatten().sort(stable=True)
        assert torch.equal(order.long(), by_row)
        distinct, lengths = expected.unique_consecutive(return_counts=True)
        assert torch.equal(rows, distinct)
        assert torch.equal(starts.diff(), lengths)
        assert starts[0] == 0
