"""Use of experts while a model is served: the figures of `peerlm.usage`, in memory that does not depend on N."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peerlm.serve.use import ExpertUse
from peerlm.serve.watch import Watch
from peerlm.usage import ExpertUsage

TOKENS, HEADS, K = 16, 4, 16


class Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor has that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, tuple | list) else [found]:
            self.elements = max(self.elements, one.numel() if isinstance(one, Tensor) else 0)
        return found


class Retrieves(nn.Module):
    """A layer that retrieves what it is given."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def forward(self, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return weights, ids


def retrieval(num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, ids that are small ones more often, and a mask."""
    weights = torch.rand(1, TOKENS, HEADS, K) - 0.5
    ids = (num_experts * torch.rand(1, TOKENS, HEADS, K) ** 2).long().clamp(max=num_experts - 1)
    return weights, ids, torch.rand(1, TOKENS) < 0.8


def counted(num_experts: int, most: int, calls: int) -> tuple[ExpertUse, ExpertUsage]:
    """The same retrievals in both ways to count."""
    use, exact = ExpertUse(num_experts, most), ExpertUsage(num_experts)
    for _ in range(calls):
        weights, ids, mask = retrieval(num_experts)
        use.add(weights, ids, mask)
        exact.add(weights, ids, mask)
    return use, exact


@pytest.mark.parametrize("calls", [1, 257])  # 257: what waits was summed up
def test_figures_are_those_of_usage_while_every_used_expert_is_counted(calls: int) -> None:
    use, exact = counted(5000, 5000, calls)
    assert use.figures() == (exact.share, pytest.approx(exact.unevenness))


def test_nothing_counted_has_the_figures_of_usage() -> None:
    assert ExpertUse(8).figures() == (0.0, math.log(8))


def test_watching_a_layer_makes_no_tensor_of_its_number_of_experts() -> None:
    layer = Retrieves(2**24)
    watch = Watch(layer)
    weights, ids, mask = retrieval(layer.num_experts)
    with Largest() as largest:
        with watch.watching(trace=True):
            layer(weights, ids)
        watch.count(mask)
        (use,) = watch.use().values()
    assert use.experts == layer.num_experts
    assert use.share > 0
    assert largest.elements == TOKENS * HEADS * K


def test_what_is_kept_is_bounded_however_many_experts_are_used() -> None:
    use, exact = counted(2**16, 1000, 257)  # the last call waits
    assert exact.share > 0.5
    assert use.elements() <= 3 * 1000 + 2 * TOKENS * HEADS * K


def test_figures_of_a_sample_are_estimates_of_the_exact_ones() -> None:
    use, exact = counted(2**15, 4096, 64)
    share, unevenness = use.figures()
    assert share != exact.share
    # 4096 at most and, with half of them dropped, 1024 at least are of the sample: five standard errors of a share.
    assert share == pytest.approx(exact.share, rel=5 / math.sqrt(1024))
    assert unevenness == pytest.approx(exact.unevenness, abs=5 / math.sqrt(1024) * math.log(2**15))


def test_an_expert_with_most_of_the_weight_stays_counted_when_others_are_sampled() -> None:
    use, exact = ExpertUse(2**12, 128), ExpertUsage(2**12)
    for first in range(0, 2**12, 64):
        ids = torch.stack([torch.arange(first, first + 64), torch.full((64,), 3)], dim=1).view(1, 64, 2, 1)
        weights = torch.tensor([1.0, 9.0]).view(1, 1, 2, 1).expand(1, 64, 2, 1)
        for each in (use, exact):
            each.add(weights, ids, torch.ones(1, 64, dtype=torch.bool))
    assert exact.unevenness == pytest.approx(
        0.9 * math.log(2**12) + 0.9 * math.log(0.9) + 0.1 * math.log(0.1), abs=0.01
    )
    # The others have a tenth of the weight; what they add to the sum is estimated of 32 of them at least.
    assert use.figures()[1] == pytest.approx(exact.unevenness, abs=0.1 * 5 / math.sqrt(32) * math.log(2**12))
