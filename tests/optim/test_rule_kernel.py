"""The native Gauss rules against their definition in `catch_up`."""

import math

import pytest
import torch

from peerlm.ops.cpu import native
from peerlm.ops.cpu import rows as native_rows
from peerlm.optim.catch_up import TOLERANCE, RateHistory, catch_up_rules, fit_rules, missed_steps

pytestmark = pytest.mark.skipif(bool(native.unavailable()), reason=f"no native kernels: {native.unavailable()}")


def cosine_history(steps: int) -> RateHistory:
    history = RateHistory.empty(0)
    for step in range(steps):
        history = history.append(5e-3 * (1 + math.cos(math.pi * step / 420)), 0.1)
    return history


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95), (0.99, 0.999), (0.5, 0.9)], ids=str)
def test_the_kernel_takes_as_many_nodes_as_the_definition(betas: tuple[float, float]) -> None:
    history, since = cosine_history(400), torch.arange(0, 400, 7)
    rules = catch_up_rules(history, since, *betas)
    num_nodes_S, weights_SJ, nodes_SJ = fit_rules(*missed_steps(history, since, *betas))
    assert rules.num_nodes.dtype == torch.int32
    assert rules.num_nodes.tolist() == num_nodes_S.tolist()
    torch.testing.assert_close(rules.weights, weights_SJ, rtol=1e-7, atol=1e-12 * weights_SJ.max().item())
    torch.testing.assert_close(rules.nodes, nodes_SJ, rtol=1e-7, atol=0)


def test_a_rule_does_not_depend_on_its_company() -> None:
    history, since = cosine_history(300), torch.arange(0, 300, 3)
    together = catch_up_rules(history, since, 0.9, 0.95)
    for number in (1, 20, 60, 90, 99):
        alone = catch_up_rules(history, since[number : number + 1], 0.9, 0.95)
        assert torch.equal(alone.weights[0], together.weights[number])
        assert torch.equal(alone.nodes[0], together.nodes[number])


def test_the_kernel_refuses_terms_that_do_not_fit() -> None:
    terms = torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="terms and rules do not fit"):
        native_rows.fit_rules(terms, terms[:1], TOLERANCE, torch.arange(1.0, 8.0, dtype=torch.float64), 16)
