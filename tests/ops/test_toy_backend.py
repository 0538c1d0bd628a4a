"""The seam for backends: one file and one entry in the table are all that a new one needs."""

from pathlib import Path
from types import ModuleType

import pytest
import torch

from peerlm import PEER, ProductKeyMemory
from peerlm.ops import api
from peerlm.testing import assert_within_budget, mix_inputs


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`toy_backend.py`, entered in the table before all others."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.setattr(api, "_BACKENDS", {"toy": ("toy_backend",), **api._BACKENDS})
    import toy_backend

    toy_backend.CALLS.clear()
    return toy_backend


def layers(backend: str) -> list[torch.nn.Module]:
    torch.manual_seed(1)
    sizes = {"heads": 2, "key_dim": 4, "backend": backend}
    memory = ProductKeyMemory(8, num_values=16, values_per_head=3, **sizes)
    return [PEER(8, num_experts=16, experts_per_head=3, **sizes).double(), memory.double()]


@pytest.mark.parametrize("backend", ["toy", "auto"])
def test_layers_run_on_a_backend_that_they_never_heard_of(toy: ModuleType, backend: str) -> None:
    x = torch.randn(5, 8, dtype=torch.float64)
    for ours, other in zip(layers(backend), layers("reference"), strict=True):
        found = [ours(x), *torch.autograd.grad(ours(x).square().sum(), list(ours.parameters()))]
        expected = [other(x), *torch.autograd.grad(other(x).square().sum(), list(other.parameters()))]
        torch.testing.assert_close(found, expected)
    assert {"linear", "retrieve", "mix_experts", "mix_values"} <= set(toy.CALLS)


def test_auto_passes_it_over_where_it_cannot_and_an_explicit_choice_is_refused(toy: ModuleType) -> None:
    inputs = mix_inputs(3, 4, 6, 5)
    half = inputs.to(torch.bfloat16)
    expected = api.mix_experts(*half.arguments(), backend="reference")
    exact = api.mix_experts(*inputs.arguments(), backend="reference")
    assert_within_budget(api.mix_experts(*half.arguments()), expected, exact)
    assert toy.CALLS == []
    with pytest.raises(ValueError, match="backend is 'toy', but loops take no bfloat16; choose 'auto', or convert"):
        api.mix_experts(*half.arguments(), backend="toy")
    with pytest.raises(ValueError, match="backend is 'toy', but loops have no row gradients and no scales"):
        api.mix_experts(*inputs.arguments(), backend="toy", row_gradients=True)


def test_it_is_listed_and_named_in_errors(toy: ModuleType) -> None:
    assert api.available_backends()["toy"] == "loops over tokens"
    with pytest.raises(ValueError, match="backend is 'fast'; choose one of auto, toy, cpu"):
        api.check_backend("fast")


def test_one_that_the_machine_has_not_is_refused_by_name_and_passed_over_by_auto(
    toy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy, "unavailable", lambda: "there are no loops here")
    with pytest.raises(ValueError, match="backend is 'toy', but there are no loops here"):
        PEER(8, num_experts=16, heads=2, experts_per_head=3, key_dim=4, backend="toy")
    inputs = mix_inputs(3, 4, 6, 5)
    expected = api.mix_experts(*inputs.arguments(), backend="bag")
    assert torch.equal(api.mix_experts(*inputs.arguments()), expected)
    assert toy.CALLS == []
    assert "toy" not in api.available_backends()["auto"]
