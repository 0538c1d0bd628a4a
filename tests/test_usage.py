import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from peerlm import PEER
from peerlm.growth import grow, set_opening
from peerlm.layers import DenseFFW, ProductKeyMemory, TokenChoiceMoE
from peerlm.ranks import Ranks
from peerlm.usage import ExpertUsage, record_usage

from .processes import ranks


def histogram(num_experts, weights, expert_ids, mask):
    """Weight and retrievals of each expert, one at a time."""
    weight, retrievals = [0.0] * num_experts, [0] * num_experts
    for token in range(weights.shape[0]):
        if mask is None or mask[token]:
            for w, expert in zip(weights[token].flatten().tolist(), expert_ids[token].flatten().tolist(), strict=True):
                weight[expert] += abs(w)
                retrievals[expert] += 1
    return weight, retrievals


@given(
    num_experts=st.integers(1, 40),
    tokens=st.integers(0, 6),
    heads=st.integers(1, 3),
    per_head=st.integers(1, 4),
    masked=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_usage_is_that_of_a_dense_histogram(num_experts, tokens, heads, per_head, masked, seed):
    generator = torch.Generator().manual_seed(seed)
    usage = ExpertUsage(num_experts)
    total, retrievals = [0.0] * num_experts, [0] * num_experts
    for _ in range(2):
        weights = torch.randn(tokens, heads, per_head, generator=generator).relu() * 2 - 0.5
        expert_ids = torch.randint(num_experts, (tokens, heads, per_head), generator=generator)
        mask = torch.rand(tokens, generator=generator) < 0.5 if masked else None
        usage.add(weights, expert_ids, mask)
        added = histogram(num_experts, weights, expert_ids, mask)
        total = [a + b for a, b in zip(total, added[0], strict=True)]
        retrievals = [a + b for a, b in zip(retrievals, added[1], strict=True)]
    assert usage.weight_N.tolist() == pytest.approx(total, rel=1e-12)
    assert usage.retrievals_N.tolist() == retrievals
    assert usage.share == sum(weight > 0 for weight in total) / num_experts
    z = [weight / (sum(total) or 1) for weight in total]
    expected = math.log(num_experts) + sum(part * math.log(part) for part in z if part > 0)
    assert usage.unevenness == pytest.approx(expected, abs=1e-12)


def test_even_use_has_no_unevenness_and_a_single_expert_all_of_it():
    even, single = ExpertUsage(16), ExpertUsage(16)
    even.add(torch.full((16, 1, 1), 0.3), torch.arange(16).view(16, 1, 1))
    single.add(torch.full((5, 1, 1), 0.3), torch.full((5, 1, 1), 7))
    assert (even.share, single.share) == (1, 1 / 16)
    assert even.unevenness == pytest.approx(0, abs=1e-12)
    assert single.unevenness == pytest.approx(math.log(16))


def test_zero_weight_is_no_use_but_a_retrieval():
    usage = ExpertUsage(4)
    usage.add(torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[2, 3]]]))
    assert usage.share == 1 / 4
    assert usage.retrievals_N.tolist() == [0, 0, 1, 1]


def test_padding_may_hold_nan():
    usage = ExpertUsage(4)
    weights = torch.tensor([[[1.0]], [[math.nan]]])
    usage.add(weights, torch.tensor([[[0]], [[1]]]), torch.tensor([True, False]))
    assert usage.weight_N.tolist() == [1, 0, 0, 0]


def test_small_weights_are_not_lost_beside_large_sums():
    usage = ExpertUsage(1)
    usage.add(torch.full((1, 1, 1), 2.0**24), torch.zeros(1, 1, 1, dtype=torch.int64))
    for _ in range(8):
        usage.add(torch.ones(1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.int64))
    assert usage.weight_N.item() == 2**24 + 8


@pytest.mark.parametrize(
    ("weights", "expert_ids", "mask", "message"),
    [
        (torch.ones(2, 1, 3), torch.zeros(2, 1, 4, dtype=torch.int64), None, r"\(2, 1, 3\).*\(2, 1, 4\)"),
        (torch.ones(2, 1, 3), torch.zeros(2, 1, 3, dtype=torch.int64), torch.ones(3), r"\(3,\).*\(2,\)"),
    ],
)
def test_shapes_that_disagree_are_named(weights, expert_ids, mask, message):
    with pytest.raises(ValueError, match=message):
        ExpertUsage(9).add(weights, expert_ids, mask)


def test_no_experts_cannot_be_counted():
    with pytest.raises(ValueError, match="num_experts is 0"):
        ExpertUsage(0)


def peer(**changes):
    settings = {"num_experts": 64, "heads": 2, "experts_per_head": 3, "key_dim": 4, **changes}
    return PEER(8, **settings).eval()


@pytest.mark.parametrize("weighting", ["softmax", "none"])
def test_a_layer_is_recorded_as_it_retrieves(weighting):
    layer = peer(weighting=weighting)
    x = torch.randn(2, 5, 8)
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    with record_usage(layer) as usage, torch.no_grad():
        layer(x, mask)
        layer.product_keys(x, mask=mask)
    expected = ExpertUsage(64)
    weights, expert_ids = layer.retrieve(x)
    expected.add(weights[mask], expert_ids[mask])
    (recorded,) = usage.values()
    assert recorded.retrievals_N.sum() == 2 * 7 * 2 * 3
    assert recorded.retrievals_N.tolist() == (2 * expected.retrievals_N).tolist()
    torch.testing.assert_close(recorded.weight_N, 2 * expected.weight_N)


def test_counts_go_on_where_a_layer_grows():
    layer, x = peer(pairing="shells"), torch.randn(40, 8)
    with record_usage(layer) as usage, torch.no_grad():
        first = layer.retrieve(x)
        set_opening(grow(layer, 100), 1)
        second = layer.retrieve(x)
    expected = ExpertUsage(100)
    expected.add(*first)
    expected.add(*second)
    (recorded,) = usage.values()
    assert second[1].max() >= 64
    assert recorded.num_experts == 100
    assert torch.equal(recorded.retrievals_N, expected.retrievals_N)
    assert torch.equal(recorded.weight_N, expected.weight_N)


def test_counts_of_fewer_experts():
    with pytest.raises(ValueError, match="num_experts is 9, fewer than the 16 that were counted"):
        ExpertUsage(16).grow(9)


def test_layers_are_told_apart_by_name_and_others_left_out():
    class Experts(nn.Module):
        """Has experts, but returns no retrieval."""

        num_experts = 4

        def forward(self, x):
            return x, x

    model = nn.Sequential(peer(), DenseFFW(8), peer(num_experts=16), TokenChoiceMoE(8), ProductKeyMemory(8), Experts())
    x = torch.randn(3, 8)
    with record_usage(model) as usage:
        model.eval()(x)
    names = {name.partition(".")[0]: recorded.num_experts for name, recorded in usage.items()}
    assert (names["0"], names["2"]) == (64, 16)
    assert set(names) == {"0", "2", "4"}


def test_hooks_are_gone_after_the_context_also_by_an_exception():
    layer = peer()
    with pytest.raises(RuntimeError, match="boom"), record_usage(layer) as usage:
        raise RuntimeError("boom")
    layer(torch.randn(3, 8))
    assert usage == {}
    assert not any(module._forward_hooks for module in layer.modules())


def test_recording_changes_neither_output_nor_gradients():
    layer = peer()
    x = torch.randn(4, 8, requires_grad=True)
    plain = layer(x)
    with record_usage(layer):
        recorded = layer(x)
    assert torch.equal(plain, recorded)
    gradients = [torch.autograd.grad(output.square().sum(), x)[0] for output in (plain, recorded)]
    assert torch.equal(*gradients)


def test_merge_alone_changes_nothing():
    usage = ExpertUsage(4)
    usage.add(torch.ones(1, 1, 1), torch.ones(1, 1, 1, dtype=torch.int64))
    usage.merge(Ranks(rank=0, world_size=1, device=torch.device("cpu")))
    assert usage.weight_N.tolist() == [0, 1, 0, 0]


def add_and_merge():
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    usage = ExpertUsage(4)
    usage.add(torch.full((1, 1, 1), 0.5 + rank), torch.full((1, 1, 1), rank))
    usage.merge(Ranks(rank=rank, world_size=2, device=torch.device("cpu")))
    print(usage.weight_N.tolist(), usage.retrievals_N.tolist())  # noqa: T201
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_merge_sums_over_ranks(tmp_path):
    with ranks(2, tmp_path, add_and_merge) as both:
        assert both.wait() == [0, 0], both.said()
        assert both.said() == ["[0.5, 1.5, 0.0, 0.0] [1, 1, 0, 0]\n"] * 2
