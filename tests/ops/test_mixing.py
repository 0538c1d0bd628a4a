"""Expert mixing: every backend against loops; gradients against finite differences and the definition."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peerlm.ops import api, bag
from peerlm.ops.functions import ACTIVATIONS
from peerlm.testing import MixInputs, assert_within_budget, loop_mix_experts, mix_inputs

BACKENDS = [backend for backend in api.BACKENDS if backend != "auto"]
FLOAT64_BACKENDS = ["reference", "bag"]
OTHER_BACKENDS = [backend for backend in BACKENDS if backend != "reference"]
# tokens, experts per token, dim, experts, all on one expert
AWKWARD_SIZES = [
    (0, 4, 7, 5, False),
    (1, 1, 1, 1, False),
    (1, 6, 64, 9, False),
    (63, 1, 7, 5, False),
    (63, 8, 64, 4, False),
    (63, 8, 64, 100, True),
]


def plain_mix(x: Tensor, weights: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    """The GELU experts' equations, every step rounded to the dtype of the arguments."""
    down, up, *gate = rows[ids].unbind(-2)
    hidden = (down @ x[..., None]).squeeze(-1)
    hidden = hidden * F.gelu((gate[0] @ x[..., None]).squeeze(-1)) if gate else F.gelu(hidden)
    return ((hidden * weights)[:, None] @ up).squeeze(1)


def values_and_gradients(inputs: MixInputs, activation: str, backend: str | None) -> list[Tensor]:
    """Output, then the gradients of a fixed weighted sum of it; without a backend by `plain_mix`."""
    if backend is None:
        out = plain_mix(*inputs.arguments())
    else:
        out = api.mix_experts(*inputs.arguments(), activation=activation, backend=backend)
    coefficients = torch.linspace(-1, 1, max(out.numel(), 1), dtype=torch.float64)[: out.numel()]
    coefficients = coefficients.bfloat16().to(out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * coefficients).sum(), inputs.leaves())]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
def test_mixing_equals_loops_over_neurons(backend: str, activation: str, gated: bool) -> None:
    inputs = mix_inputs(5, 6, 3, 4, gated=gated)
    out = api.mix_experts(*inputs.arguments(), activation=activation, backend=backend)
    torch.testing.assert_close(out.detach(), loop_mix_experts(inputs, activation))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
def test_gradients_of_mixing(backend: str, activation: str, gated: bool) -> None:
    inputs = mix_inputs(3, 4, 3, 4, gated=gated)
    ids = inputs.ids.clone()
    ids[0] = 2  # one expert four times

    def mix(x: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
        return api.mix_experts(x, weights, ids, rows, activation=activation, backend=backend)

    assert torch.autograd.gradcheck(mix, inputs.leaves())


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
def test_gradients_of_mixing_values(backend: str) -> None:
    inputs = mix_inputs(3, 4, 3, 4)
    values = inputs.rows[:, 1].detach().requires_grad_()

    def mix(weights: Tensor, values: Tensor) -> Tensor:
        return api.mix_values(weights, inputs.ids, values, backend=backend)

    assert torch.autograd.gradcheck(mix, (inputs.weights, values))
    ones = torch.ones(3, 4, dtype=torch.float64)
    expected = torch.stack([values[ids].sum(dim=0) for ids in inputs.ids])
    torch.testing.assert_close(mix(ones, values), expected)


@pytest.mark.parametrize("frozen", ["x", "weights", "rows"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_with_one_argument_frozen(backend: str, frozen: str) -> None:
    wide = mix_inputs(3, 4, 3, 4, gated=True)
    inputs = wide.to(torch.float32)
    names = ["x", "weights", "rows"]
    plain, exact = (
        dict(zip(names, values_and_gradients(each, "gelu", "reference")[1:], strict=True)) for each in (inputs, wide)
    )
    getattr(inputs, frozen).requires_grad_(False)
    trained = [name for name in names if name != frozen]
    out = api.mix_experts(*inputs.arguments(), backend=backend)
    coefficients = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).bfloat16().float().view(out.shape)
    gradients = torch.autograd.grad((out * coefficients).sum(), [getattr(inputs, name) for name in trained])
    assert_within_budget(gradients, [plain[name] for name in trained], [exact[name] for name in trained])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("size", AWKWARD_SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", OTHER_BACKENDS)
def test_backend_errs_no_more_than_the_definition_in_plain_low_precision(
    backend: str, dtype: torch.dtype, size: tuple[int, int, int, int, bool], gated: bool
) -> None:
    tokens, per_token, dim, num_experts, one_expert = size
    if backend == "triton":  # which is interpreted here, a token at a time
        tokens = min(tokens, 19)
    inputs = mix_inputs(tokens, per_token, dim, num_experts, gated=gated, one_expert=one_expert)
    exact = values_and_gradients(inputs, "gelu", "reference")
    plain = values_and_gradients(inputs.to(dtype), "gelu", None)
    actual = values_and_gradients(inputs.to(dtype), "gelu", backend)
    for a, p, e in zip(actual, plain, exact, strict=True):
        assert_within_budget(a, p, e)


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_has_the_dtype_of_the_input_and_gradients_that_of_the_tables(backend: str) -> None:
    inputs = mix_inputs(3, 4, 6, 4)
    x = inputs.x.detach().float()
    rows = inputs.rows.detach().bfloat16().requires_grad_()
    out = api.mix_experts(x, inputs.weights.detach().float(), inputs.ids, rows, backend=backend)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert rows.grad is not None
    assert rows.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_in_bfloat16_are_computed_with_in_float32(backend: str, x_dtype: torch.dtype) -> None:
    if backend in ("cpu", "triton") and x_dtype == torch.float64:
        pytest.skip("the kernels take no float64")
    wide = mix_inputs(12, 4, 16, 7)
    plain = wide.to(torch.float32)
    x, weights, rows = (each.detach() for each in (wide.x.to(x_dtype), wide.weights.to(x_dtype), wide.rows.bfloat16()))
    found = [
        api.mix_experts(x, weights, wide.ids, rows, backend=backend),
        api.dot_values(x, wide.ids, rows[:, 0].contiguous(), backend=backend),
    ]
    expected, exact = (
        [
            api.mix_experts(*each.arguments(), backend="reference"),
            api.dot_values(each.x, each.ids, each.rows[:, 0], backend="reference"),
        ]
        for each in (plain, wide)
    )
    assert_within_budget([each.float() for each in found], expected, exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_need_not_be_contiguous(backend: str) -> None:
    inputs = mix_inputs(4, 4, 4, 5)
    strided = [t.detach().movedim(0, -1).contiguous().movedim(-1, 0) for t in inputs.to(torch.float32).arguments()]
    assert not any(tensor.is_contiguous() for tensor in strided)
    out = api.mix_experts(*strided, backend=backend)
    plain = plain_mix(*inputs.to(torch.float32).arguments())
    assert_within_budget(out, plain, loop_mix_experts(inputs, "gelu"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_change_the_arithmetic(backend: str) -> None:
    inputs = mix_inputs(3, 4, 6, 4).to(torch.float32)
    plain = api.mix_experts(*inputs.arguments(), backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = api.mix_experts(*inputs.arguments(), backend=backend)
        values = api.mix_values(inputs.weights, inputs.ids, inputs.rows[:, 1], backend=backend)
    assert torch.equal(plain, autocast)
    assert values.dtype == torch.float32


def test_definition_is_twice_differentiable() -> None:
    inputs = mix_inputs(2, 2, 2, 3)

    def mix(x: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
        return api.mix_experts(x, weights, inputs.ids, rows, activation="silu", backend="reference")

    assert torch.autograd.gradgradcheck(mix, inputs.leaves())


@pytest.mark.parametrize("backend", OTHER_BACKENDS)
def test_others_refuse_second_derivatives(backend: str) -> None:
    inputs = mix_inputs(2, 2, 2, 3).to(torch.float32)
    out = api.mix_experts(*inputs.arguments(), backend=backend)
    (gradient,) = torch.autograd.grad(out.sum(), inputs.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        gradient.sum().backward()


@pytest.mark.parametrize(("dtype", "chosen"), [(torch.float32, "cpu.kernels"), (torch.float64, "bag")])
def test_auto_is_the_backend_that_suits_the_arguments(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chosen: str
) -> None:
    inputs = mix_inputs(3, 4, 6, 4).to(dtype)
    chosen_output = torch.empty(0)
    monkeypatch.setattr(f"peerlm.ops.{chosen}.mix_experts", lambda *_: chosen_output)
    assert api.mix_experts(*inputs.arguments(), backend="auto") is chosen_output
    assert set(api.available_backends()) == set(api.BACKENDS)


def test_unknown_backend() -> None:
    inputs = mix_inputs(3, 4, 6, 4)
    message = "backend is 'cuda'; choose one of auto, cpu, triton, bag, reference"
    with pytest.raises(ValueError, match=message):
        api.mix_experts(*inputs.arguments(), backend="cuda")
    with pytest.raises(ValueError, match=message):
        api.mix_values(inputs.weights, inputs.ids, inputs.rows[:, 1], backend="cuda")


@pytest.mark.parametrize(("shape", "num_rows"), [((3, 4), 5), ((2, 3), 100), ((0, 3), 4), ((1, 1), 1)])
def test_distinct_ids_are_found_without_asking_how_many_there_are(shape: tuple[int, int], num_rows: int) -> None:
    """As a device other than a CPU finds them, which would be waited for."""
    ids = torch.randint(num_rows, shape)
    used, places = bag._padded_distinct(ids, num_rows)
    assert used.shape == (min(ids.numel(), num_rows),)
    assert torch.equal(used[places], ids)
    distinct = ids.unique()
    assert torch.equal(used[: len(distinct)], distinct)
    assert not used[len(distinct) :].any()
