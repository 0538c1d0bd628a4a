"""Layers beside each other: the sum of both, at the output scale of one."""

import copy

import pytest
import torch
from torch import nn

from peerlm.accounting import model_cost
from peerlm.layers import PEER, DenseFFW, ParallelFFW, ProductKeyMemory
from peerlm.layers.output_scale import OUTPUT_POWER

SMALL = {"heads": 2, "key_dim": 8}


def peer_and_dense() -> ParallelFFW:
    peer = PEER(32, num_experts=16**2, experts_per_head=4, **SMALL)
    return ParallelFFW({"peer": peer, "dense": DenseFFW(32, hidden=16)})


@pytest.mark.usefixtures("float64")
def test_the_output_is_the_sum_and_padding_reaches_each_part() -> None:
    layer, x = peer_and_dense(), torch.randn(2, 5, 32)
    mask = torch.arange(5) < torch.tensor([[3], [5]])
    parts, y = copy.deepcopy(layer), layer(x, mask)
    torch.testing.assert_close(y, parts.peer(x, mask) + parts.dense(x))
    statistics = [each.peer.product_keys.query_norm.running_mean for each in (layer, parts)]
    torch.testing.assert_close(*statistics)


@torch.no_grad()
@pytest.mark.parametrize("others", [{}, {"pkm": 64**2}])
def test_the_sum_starts_at_the_scale_of_one_layer(others: dict[str, int]) -> None:
    parts: dict[str, nn.Module] = {"peer": PEER(128, num_experts=128**2), "dense": DenseFFW(128, hidden=64)}
    parts |= {name: ProductKeyMemory(128, num_values=size) for name, size in others.items()}
    layer, x = ParallelFFW(parts), torch.randn(1024, 128)
    assert layer(x).square().mean().item() == pytest.approx(OUTPUT_POWER, rel=0.15)
    for part in layer.children():
        assert part(x).square().mean().item() == pytest.approx(OUTPUT_POWER / len(parts), rel=0.15)
    layer.reset_parameters(output_scale=0.1)
    assert layer(x).square().mean().item() == pytest.approx(0.01 * OUTPUT_POWER, rel=0.15)


def test_costs_add_up() -> None:
    layer = peer_and_dense()
    whole, parts = model_cost(layer, 8), [model_cost(part, 8) for part in layer.children()]
    for name in ("total_parameters", "active_parameters", "forward_flops_per_token"):
        assert getattr(whole, name) == sum(getattr(part, name) for part in parts)


def test_parts_of_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"widths .* are \{'a': 8, 'b': 16\}; give at least one, all of one width"):
        ParallelFFW({"a": DenseFFW(8), "b": DenseFFW(16)})
