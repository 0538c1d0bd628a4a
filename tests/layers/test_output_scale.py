"""Every layer starts at the output scale of a dense GELU FFW."""

import math

import pytest
import torch
from torch import nn

from peerlm.growth import grow
from peerlm.layers import (
    PEER,
    DenseFFW,
    ExpertChoiceMoE,
    FineGrainedMoE,
    HashedNgrams,
    ProductKeyMemory,
    TokenChoiceMoE,
)
from peerlm.layers.hashed_ngrams import GATE_POWER
from peerlm.layers.output_scale import ACTIVATION_POWER, INPUT_STD, OUTPUT_POWER, output_std
from peerlm.ops.functions import ACTIVATIONS, WEIGHTINGS
from peerlm.ops.scoring import half_scores

# The draw of weights and tokens moves the mean square by several percent: sub-keys and large experts are few.
TOLERANCE = 0.15


@torch.no_grad()
def output_power(layer: nn.Module, dim: int, tokens: int = 256) -> float:
    return layer(torch.randn(tokens, dim)).square().mean().item()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_power_is_the_integral_over_what_goes_in(activation: str) -> None:
    z = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    value = ACTIVATIONS[activation](INPUT_STD.get(activation, 1.0) * z)
    power = torch.trapezoid(value.square() * density, z).item()
    assert ACTIVATION_POWER[activation] == pytest.approx(power, abs=5e-6)


def test_output_std_inverts_the_power_of_the_sum() -> None:
    std = output_std(0.25, "relu")
    assert std**2 * 0.25 * ACTIVATION_POWER["relu"] == pytest.approx(OUTPUT_POWER)


@torch.no_grad()
def test_queries_and_half_scores_start_with_their_variances() -> None:
    layer = PEER(128, num_experts=64**2, query_norm="none")
    query = layer.product_keys.query(torch.randn(256, 128))
    assert query.var().item() == pytest.approx(1, rel=TOLERANCE)
    assert half_scores(query, layer.product_keys.sub_keys).var().item() == pytest.approx(1 / 3, rel=TOLERANCE)


@pytest.mark.parametrize("dim", [128, 512])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dense(activation: str, gated: bool, dim: int) -> None:
    layer = DenseFFW(dim, activation=activation, gated=gated)
    assert output_power(layer, dim) == pytest.approx(OUTPUT_POWER, rel=TOLERANCE)


@pytest.mark.parametrize("dim", [128, 512])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_peer(activation: str, weighting: str, dim: int) -> None:
    layer = PEER(dim, num_experts=128**2, activation=activation, weighting=weighting)
    assert output_power(layer, dim) == pytest.approx(OUTPUT_POWER, rel=TOLERANCE)


@torch.no_grad()
def test_experts_of_one_plus_start_near_a_memory() -> None:
    for gated, activated in ((False, 0), (True, 2)):
        layer = PEER(128, num_experts=64**2, activation="one_plus", gated=gated, pairing="shells")
        grow(layer, 128**2)
        for rows in (layer.experts.rows[: 64**2], layer.experts.rows[64**2 :]):
            deviations = rows.std(dim=(0, 2))
            assert deviations[activated].item() == pytest.approx(0.1 * 128**-0.5, rel=0.01)
            if gated:
                assert deviations[0].item() == pytest.approx(128**-0.5, rel=0.01)


@pytest.mark.parametrize("query_norm", ["layer", "none"])
@pytest.mark.parametrize("shared_keys", [False, True])
def test_gated_peer_of_either_index(shared_keys: bool, query_norm: str) -> None:
    layer = PEER(128, num_experts=128**2, gated=True, shared_keys=shared_keys, query_norm=query_norm)
    assert output_power(layer, 128) == pytest.approx(OUTPUT_POWER, rel=TOLERANCE)


@pytest.mark.slow
def test_peer_of_a_million_experts() -> None:
    assert output_power(PEER(128), 128) == pytest.approx(OUTPUT_POWER, rel=TOLERANCE)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_product_key_memory(weighting: str) -> None:
    layer = ProductKeyMemory(128, num_values=128**2, weighting=weighting)
    assert output_power(layer, 128) == pytest.approx(OUTPUT_POWER, rel=TOLERANCE)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_gated_memory(weighting: str) -> None:
    layer = ProductKeyMemory(128, num_values=128**2, weighting=weighting, gated=True, weight_scale=4.0)
    assert output_power(layer, 128) == pytest.approx(OUTPUT_POWER, rel=TOLERANCE)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("mixture", [ExpertChoiceMoE, TokenChoiceMoE])
def test_mixtures(mixture: type[nn.Module], activation: str) -> None:
    power = output_power(mixture(128, activation=activation), 128, tokens=4096)
    assert power == pytest.approx(OUTPUT_POWER, rel=TOLERANCE)


@pytest.mark.parametrize("shared_experts", [0, 1, 3])
def test_fine_grained_mixture(shared_experts: int) -> None:
    layer = FineGrainedMoE(128, shared_experts=shared_experts)
    assert output_power(layer, 128, tokens=1024) == pytest.approx(OUTPUT_POWER, rel=TOLERANCE)
    if layer.shared is not None:
        assert layer.shared.up_proj.weight.std().item() == pytest.approx(layer.up.std().item(), rel=0.05)


def test_gate_power_is_the_integral_over_what_goes_in() -> None:
    z = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    power = torch.trapezoid(torch.sigmoid(z).square() * density, z).item()
    assert pytest.approx(power, abs=5e-6) == GATE_POWER


@torch.no_grad()
@pytest.mark.parametrize("row_dim", [None, 64])
def test_hashed_ngrams(row_dim: int | None) -> None:
    layer = HashedNgrams(128, num_rows=4096, row_dim=row_dim)
    y = layer(torch.randn(1024, 128), tokens=torch.randint(1000, (1024, 3)))
    assert y.square().mean().item() == pytest.approx(OUTPUT_POWER, rel=TOLERANCE)


@pytest.mark.parametrize(
    "layer",
    [
        DenseFFW(32),
        PEER(32, num_experts=64**2, experts_per_head=8),
        ProductKeyMemory(32, num_values=64**2),
        ExpertChoiceMoE(32),
        TokenChoiceMoE(32),
        FineGrainedMoE(32, num_experts=16, experts_per_token=4),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_output_scale_multiplies_the_output(layer: nn.Module) -> None:
    layer.reset_parameters(output_scale=0.1)
    assert output_power(layer, 32, tokens=1024) == pytest.approx(0.01 * OUTPUT_POWER, rel=2 * TOLERANCE)


@pytest.mark.parametrize("layer_class", [PEER, ProductKeyMemory])
@pytest.mark.usefixtures("float64")
def test_scaled_weights_leave_the_loudness_and_shrink_the_rows(layer_class: type[nn.Module]) -> None:
    size = {"num_experts" if layer_class is PEER else "num_values": 64**2}
    torch.manual_seed(0)
    plain = layer_class(32, **size)
    torch.manual_seed(0)
    scaled = layer_class(32, **size, weight_scale=16.0)
    x = torch.randn(64, 32)
    torch.testing.assert_close(plain.eval()(x), scaled.eval()(x))
    vectors = [layer.experts.up if layer_class is PEER else layer.values.rows for layer in (plain, scaled)]
    torch.testing.assert_close(vectors[0], 16 * vectors[1])


@pytest.mark.parametrize("layer_class", [PEER, ProductKeyMemory])
@pytest.mark.parametrize("weight_scale", [0.0, -1.0, float("inf"), float("nan")])
def test_impossible_weight_scale(layer_class: type[nn.Module], weight_scale: float) -> None:
    with pytest.raises(ValueError, match=f"weight_scale is {weight_scale}; .* take a number above 0"):
        layer_class(32, weight_scale=weight_scale)


def test_construction_on_the_meta_device() -> None:
    with torch.device("meta"):
        layer = PEER(64)
    assert layer.experts.down.shape == (1024**2, 64)
