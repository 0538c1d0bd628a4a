"""The fine-grained mixture against loops that follow its paper."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peerlm.layers import FineGrainedMoE
from peerlm.ops.grouped_products import grouped_product
from peerlm.testing import assert_within_budget
from peerlm.usage import record_usage


def by_loops(layer: FineGrainedMoE, x_TD: Tensor) -> Tensor:
    """DeepSeek-V3's equations 12 to 16, token by token."""
    y_TD = torch.zeros_like(x_TD)
    for t, x in enumerate(x_TD):
        affinities = torch.sigmoid(x @ layer.router.score.weight.T)
        ranked = (affinities + layer.router.bias).tolist()
        chosen = sorted(range(layer.num_experts), key=lambda e: -ranked[e])[: layer.experts_per_token]
        for expert in chosen:
            hidden, gate = (x @ layer.down[expert]).chunk(2)
            weight = layer.routed_scale * affinities[expert] / affinities[chosen].sum()
            y_TD[t] += weight * ((hidden * F.silu(gate)) @ layer.up[expert])
        if layer.shared is not None:
            hidden = (x @ layer.shared.down_proj.weight.T) * F.silu(x @ layer.shared.gate_proj.weight.T)
            y_TD[t] += hidden @ layer.shared.up_proj.weight.T
    return y_TD


@pytest.mark.parametrize("shared_experts", [0, 2])
@pytest.mark.parametrize("skew", [0.0, 3.0], ids=["even", "one expert takes all, some none"])
def test_equals_loops(skew: float, shared_experts: int) -> None:
    layer = FineGrainedMoE(6, num_experts=5, experts_per_token=2, shared_experts=shared_experts).double()
    layer.router.bias.copy_(skew * torch.arange(5.0))
    x = torch.randn(9, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), by_loops(layer, x))


@pytest.mark.parametrize("dim", [8, 16, 9])  # the last is not aligned for a grouped product
def test_float32_errs_no_more_than_loops(dim: int) -> None:
    layer = FineGrainedMoE(dim, num_experts=6, experts_per_token=3, hidden=dim)
    x = torch.randn(33, dim)
    exact = FineGrainedMoE(dim, num_experts=6, experts_per_token=3, hidden=dim).double()
    exact.load_state_dict(layer.state_dict())
    expected = by_loops(exact, x.double())
    expected.square().sum().backward()
    judged = {"y": expected} | {name: each.grad for name, each in exact.named_parameters()}
    results = []
    for forward in (layer, lambda x: by_loops(layer, x)):
        layer.zero_grad()
        y = forward(x)
        y.square().sum().backward()
        results.append({"y": y} | {name: each.grad.clone() for name, each in layer.named_parameters()})
    assert_within_budget(*results, judged)


def test_a_grouped_product_of_either_way_equals_loops_over_groups() -> None:
    counts, x, weights = torch.tensor([3, 0, 7, 1]), torch.randn(11, 8), torch.randn(4, 8, 12)
    ends = counts.cumsum(0).int()
    parts = x.double().split(counts.tolist())
    expected = torch.cat([part @ weight.double() for part, weight in zip(parts, weights, strict=True)])
    torch.testing.assert_close(grouped_product(x, weights, ends).double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grouped_product(x.double(), weights.double(), ends), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = grouped_product(x, weights, ends)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.double(), expected, atol=0.2, rtol=0.05)


def test_gradients_of_gradients_exist() -> None:
    layer = FineGrainedMoE(4, num_experts=3, experts_per_token=2).double()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, x)


def test_the_same_call_has_the_same_bits() -> None:
    layer, x = FineGrainedMoE(32, num_experts=8, experts_per_token=3), torch.randn(65, 32)
    found = []
    for _ in range(3):
        layer.zero_grad()
        y = layer(x.requires_grad_())
        y.square().sum().backward()
        found.append([y, x.grad, *(parameter.grad for parameter in layer.parameters())])
        x.grad = None
    for each in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(each, found[0], strict=True))


def test_usage_is_recorded_as_of_any_index() -> None:
    layer = FineGrainedMoE(8, num_experts=6, experts_per_token=2)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    with record_usage(layer) as usage:
        layer(torch.randn(2, 3, 8), mask)
    (recorded,) = usage.values()
    assert recorded.num_experts == 6
    assert recorded.retrievals_N.sum() == 3 * 2
    assert recorded.weight_N.sum().item() == pytest.approx(3)
