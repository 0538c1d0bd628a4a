"""A router's bias moves once per step of any optimizer, by what was chosen, until the load is even."""

import copy
import gc
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peerlm.layers import FineGrainedMoE
from peerlm.layers.balanced_router import BalancedRouter
from peerlm.optim import RowAdamW

from ..processes import ranks
from .zero_rank import biases


def router(num_experts: int = 4, experts_per_token: int = 1, **settings: float) -> BalancedRouter:
    settings = {"balance_step": 0.125} | settings
    return BalancedRouter(3, num_experts=num_experts, experts_per_token=experts_per_token, **settings)


def step(module: nn.Module, rate: float = 0.0) -> None:
    torch.optim.SGD(module.parameters(), lr=rate).step()


def choosing(counts: list[int]) -> tuple[BalancedRouter, Tensor]:
    """A router, and tokens that choose its experts that often."""
    each = router(len(counts))
    with torch.no_grad():
        each.score.weight.copy_(torch.eye(len(counts), 3) * 2 - 1)
        each.score.weight[3:] = 1.0
    tokens = [each.score.weight[expert].detach() for expert, count in enumerate(counts) for _ in range(count)]
    return each, torch.stack(tokens)


def test_the_bias_goes_against_the_load_by_a_fixed_step() -> None:
    each, x = choosing([5, 1, 2, 0])
    each(x)
    assert each.load.tolist() == [5, 1, 2, 0]
    assert each.bias.tolist() == [0, 0, 0, 0]
    step(each)
    assert each.bias.tolist() == [-0.125, 0.125, 0, 0.125]
    step(each)
    assert each.bias.tolist() == [-0.125, 0.125, 0, 0.125]


def test_the_bias_changes_the_choice_and_not_the_weights() -> None:
    each, x = router(4, 2).double(), torch.randn(5, 3, dtype=torch.float64)
    each.bias.copy_(torch.tensor([0.0, 9.0, 0.0, 9.0]))
    weights, ids = each(x)
    assert set(ids.flatten().tolist()) == {1, 3}
    affinities = each.score(x).sigmoid()[:, [1, 3]]
    expected = affinities / affinities.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(weights.squeeze(1).sort().values, expected.sort().values)
    weights[..., 0].sum().backward()
    assert each.score.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, RowAdamW])
def test_micro_batches_of_a_step_count_together(optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    whole, x = choosing([5, 1, 2, 0])
    parts = copy.deepcopy(whole)
    for each, batches in ((whole, [x]), (parts, x.split(3))):
        for batch in batches:
            each(batch)[0].sum().backward()
        optimizer(each.parameters(), lr=0.0).step()
    assert whole.bias.tolist() == parts.bias.tolist() == [-0.125, 0.125, 0, 0.125]


def test_only_the_optimizer_that_has_the_weights_moves_the_bias() -> None:
    each, x = choosing([5, 1, 2, 0])
    each(x)
    step(nn.Linear(2, 2))
    assert each.bias.abs().sum() == 0


def test_padding_evaluation_and_frozen_weights_do_not_count() -> None:
    each, x = choosing([5, 1, 2, 0])
    each(x, torch.tensor([True, False, False, False, False, True, True, True]))
    assert each.load.tolist() == [1, 1, 2, 0]
    step(each)
    each.eval()(x)
    each.train().requires_grad_(False)(x)
    assert each.load is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_pass_repeated_by_checkpointing_counts_once(reentrant: bool) -> None:
    each, x = choosing([5, 1, 2, 0])
    weights, _ = checkpoint(each, x.requires_grad_(), use_reentrant=reentrant)
    weights.square().sum().backward()
    assert each.load.tolist() == [5, 1, 2, 0]


def test_training_with_the_bias_makes_the_load_even() -> None:
    torch.manual_seed(0)
    layer = FineGrainedMoE(8, num_experts=8, experts_per_token=2, balance_step=0.005)
    x = torch.randn(512, 8) + torch.randn(8)

    def busiest() -> float:
        _, ids = layer.router.eval()(x)
        return (ids.flatten().bincount(minlength=8).max() / (512 * 2 / 8)).item()

    before = busiest()
    for _ in range(120):
        layer.router.train()(x)
        step(layer)
    assert before > 2
    assert busiest() < 1.15


def test_the_bias_is_saved_and_copies_have_their_own() -> None:
    each, x = choosing([5, 1, 2, 0])
    each(x)
    twin = copy.deepcopy(each)
    step(each)
    other = router()
    other.load_state_dict(each.state_dict())
    assert other.bias.tolist() == each.bias.tolist()
    assert twin.bias.tolist() == [0, 0, 0, 0]
    step(twin)
    assert twin.bias.tolist() == each.bias.tolist()


def test_routers_are_forgotten_with_their_models() -> None:
    from peerlm.layers.balanced_router import _routers

    each = router()
    gc.collect()
    before = len(_routers)
    del each
    gc.collect()
    assert len(_routers) == before - 1


def test_an_optimizer_within_another_one_moves_no_bias() -> None:
    """ZeroRedundancyOptimizer steps one that has the weights of its own rank alone."""

    class Outer(torch.optim.SGD):
        def step(self, closure: object = None) -> None:
            torch.optim.SGD(first.parameters(), lr=0.0).step()
            moved.append(first.bias.tolist())

    moved: list[list[float]] = []
    (first, x), second = choosing([5, 1, 2, 0]), router()
    outer = Outer([*first.parameters(), *second.parameters()], lr=0.0)
    first(x)
    outer.step()
    assert moved == [[0, 0, 0, 0]]
    assert first.bias.tolist() == [-0.125, 0.125, 0, 0.125]


def test_a_step_that_failed_is_not_waited_for() -> None:
    class Fails(torch.optim.SGD):
        def step(self, closure: object = None) -> None:
            raise RuntimeError("no step")

    (first, x), second = choosing([5, 1, 2, 0]), router()
    with pytest.raises(RuntimeError, match="no step"):
        Fails(second.parameters(), lr=0.0).step()
    first(x)
    step(first)
    assert first.bias.tolist() == [-0.125, 0.125, 0, 0.125]


@pytest.mark.slow
def test_ranks_share_loads_whoever_has_the_weights_in_its_optimizer(tmp_path: Path) -> None:
    with ranks(2, tmp_path, biases, tmp_path) as both:
        assert both.wait() == [0, 0], both.said()
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["shared out"] == first["whole"]
    assert all(any(bias) for bias in first["whole"])
    assert first["whole"][0] != first["whole"][1]
