"""Costs against counts by hand and against torch's FLOP counter."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from peerlm import (
    PEER,
    DenseFFW,
    ExpertChoiceMoE,
    FineGrainedMoE,
    PeerConfig,
    PeerForCausalLM,
    ProductKeyMemory,
    TokenChoiceMoE,
)
from peerlm.accounting import model_cost
from peerlm.layers import Table

# The counter knows no embedding bags, so that the retrieving layers run by definition, as matrix products.
PEER_SETTINGS = {"num_experts": 64, "heads": 2, "experts_per_head": 3, "key_dim": 8, "backend": "reference"}
PKM_SETTINGS = {"num_values": 64, "heads": 2, "values_per_head": 3, "key_dim": 8, "backend": "reference"}
LAYERS: dict[str, Any] = {
    "dense": lambda: DenseFFW(16),
    "swiglu": lambda: DenseFFW(16, activation="silu", gated=True),
    "expert_choice": lambda: ExpertChoiceMoE(16, num_experts=4, capacity_factor=2.0),
    "token_choice": lambda: TokenChoiceMoE(16, num_experts=4, experts_per_token=2),
    "fine_grained_moe": lambda: FineGrainedMoE(16, num_experts=8, experts_per_token=3, shared_experts=2),
    "pkm": lambda: ProductKeyMemory(16, **PKM_SETTINGS),
    "memory plus": lambda: ProductKeyMemory(16, gated=True, **PKM_SETTINGS),
    "pkm, shared keys": lambda: ProductKeyMemory(16, shared_keys=True, **PKM_SETTINGS),
    "peer": lambda: PEER(16, **PEER_SETTINGS),
    "peer, keys per head": lambda: PEER(16, shared_keys=False, **PEER_SETTINGS),
    "peer, gated": lambda: PEER(16, gated=True, **PEER_SETTINGS),
}


def grouped_flops(x_MD: Any, weights_EDF: Any, *_: Any, **__: Any) -> int:
    """Of a grouped product, which the counter does not know."""
    return 2 * x_MD[0] * weights_EDF[1] * weights_EDF[2]


def counted_flops(model: nn.Module, inputs: torch.Tensor) -> int:
    own = {torch.ops.peerlm.rows_by_matrices: grouped_flops}
    with FlopCounterMode(display=False, custom_mapping=own) as counter, torch.no_grad():
        model(inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("training", [False, True])
def test_flops_of_layers_agree_with_the_counter(kind: str, training: bool) -> None:
    layer = LAYERS[kind]().train(training)
    cost = model_cost(layer, context=1)
    assert cost.forward_flops_per_token * 32 == pytest.approx(counted_flops(layer, torch.randn(32, 16)), rel=0.01)
    assert cost.training_flops_per_token == 3 * cost.forward_flops_per_token


@pytest.mark.parametrize(
    "kind", ["dense", "swiglu", "expert_choice", "token_choice", "fine_grained_moe", "pkm", "peer"]
)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("key_value_heads", [1, 4])
def test_flops_of_models_agree_with_the_counter(kind: str, tied: bool, key_value_heads: int) -> None:
    config = PeerConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=key_value_heads,
        ffw_layers=kind,
        peer=PEER_SETTINGS,
        pkm=PKM_SETTINGS,
        expert_choice={"num_experts": 4},
        hashed_ngrams={"num_rows": 64, "row_dim": 4, "backend": "reference"},
        token_choice={"num_experts": 4},
        tie_word_embeddings=tied,
        attn_implementation="eager",  # the counter knows no fused attention on CPU
    )
    model = PeerForCausalLM(config)
    flops = model_cost(model, context=24).forward_flops_per_token
    assert flops * 2 * 24 == pytest.approx(counted_flops(model, torch.randint(64, (2, 24))), rel=0.01)


@pytest.mark.parametrize(
    ("kind", "total", "active"),
    [
        ("dense", 2 * 16 * 64, 2 * 16 * 64),
        ("swiglu", 3 * 16 * 43, 3 * 16 * 43),
        # router + experts, of which 2 of 4 are active
        ("expert_choice", 16 * 4 + 4 * 2 * 16 * 64, 16 * 4 + 2 * 2 * 16 * 64),
        ("token_choice", 16 * 4 + 4 * 2 * 16 * 64, 16 * 4 + 2 * 2 * 16 * 64),
        # router + routed experts, of which 3 of 8 are active, + the shared one
        (
            "fine_grained_moe",
            16 * 8 + 8 * 3 * 16 * 8 + 3 * 16 * 16,
            16 * 8 + 3 * 3 * 16 * 8 + 3 * 16 * 16,
        ),
        # query map + its norm + sub-keys + rows, of which 2 heads * 3 are active
        ("pkm", 16 * 16 + 2 * 16 + 2 * 2 * 8 * 4 + 64 * 16, 16 * 16 + 2 * 16 + 2 * 2 * 8 * 4 + 6 * 16),
        ("pkm, shared keys", 16 * 16 + 2 * 16 + 2 * 8 * 4 + 64 * 16, 16 * 16 + 2 * 16 + 2 * 8 * 4 + 6 * 16),
        ("peer", 16 * 16 + 2 * 16 + 2 * 8 * 4 + 2 * 64 * 16, 16 * 16 + 2 * 16 + 2 * 8 * 4 + 2 * 6 * 16),
        (
            "peer, keys per head",
            16 * 16 + 2 * 16 + 2 * 2 * 8 * 4 + 2 * 64 * 16,
            16 * 16 + 2 * 16 + 2 * 2 * 8 * 4 + 2 * 6 * 16,
        ),
        (
            "peer, gated",
            16 * 16 + 2 * 16 + 2 * 8 * 4 + 3 * 64 * 16,
            16 * 16 + 2 * 16 + 2 * 8 * 4 + 3 * 6 * 16,
        ),
    ],
)
def test_parameters_of_layers(kind: str, total: int, active: int) -> None:
    cost = model_cost(LAYERS[kind](), context=1)
    assert (cost.total_parameters, cost.active_parameters) == (total, active)
    assert cost.parameter_bytes_per_token == 4 * active
    assert model_cost(LAYERS[kind]().bfloat16(), context=1).parameter_bytes_per_token == 2 * active


def test_flops_of_layers_by_hand() -> None:
    peer = 2 * 16 * 16 + 2 * 2 * 8 * 8 + 2 * 2 * 6 * 16  # query map, 2 n sub-keys per head, u . x and v
    assert model_cost(LAYERS["peer"](), context=1).forward_flops_per_token == peer
    assert model_cost(LAYERS["peer, gated"](), context=1).forward_flops_per_token == peer + 2 * 6 * 16
    assert model_cost(LAYERS["pkm"](), context=1).forward_flops_per_token == peer - 2 * 6 * 16
    assert model_cost(LAYERS["dense"](), context=1).forward_flops_per_token == 2 * 2 * 16 * 64


def test_more_retrieved_than_there_are_activates_all() -> None:
    layer = PEER(16, num_experts=4, heads=8, experts_per_head=2, key_dim=8)
    cost = model_cost(layer, context=1)
    assert cost.active_parameters == cost.total_parameters


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_of_models(tied: bool) -> None:
    config = PeerConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        peer=PEER_SETTINGS,
        tie_word_embeddings=tied,
    )
    attention = 2 * 32 * 32 + 2 * 32 * 16
    norms = 7 * 32
    dense = 2 * 2 * 32 * 128
    index = 32 * 16 + 2 * 16 + 2 * 8 * 4
    rest = 3 * attention + norms + dense + index
    cost = model_cost(PeerForCausalLM(config), context=8)
    matrices = 64 * 32 if tied else 2 * 64 * 32
    active_matrices = 64 * 32 if tied else 64 * 32 + 32  # an embedding apart from the output matrix costs its row
    assert cost.total_parameters == rest + matrices + 2 * 64 * 32
    assert cost.active_parameters == rest + active_matrices + 2 * 6 * 32


def test_attention_counts_the_context() -> None:
    config = PeerConfig(vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffw_layers="dense")
    model = PeerForCausalLM(config)
    costs = [model_cost(model, context).forward_flops_per_token for context in (10, 30)]
    assert costs[1] - costs[0] == 3 * 4 * 32 * 20


def test_no_parameters() -> None:
    cost = model_cost(nn.Identity(), context=1)
    assert (cost.total_parameters, cost.forward_flops_per_token, cost.parameter_bytes_per_token) == (0, 0, 0)


@pytest.mark.parametrize(("row_format", "of_a_row"), [("float32", 8 * 16), ("bfloat16", 4 * 16), ("int8", 2 * 16 + 8)])
def test_bytes_of_rows_are_those_of_their_format(row_format: str, of_a_row: int) -> None:
    cost = model_cost(PEER(16, row_format=row_format, **PEER_SETTINGS), context=1)
    index = 4 * (16 * 16 + 2 * 16 + 2 * 8 * 4)
    assert cost.row_bytes_per_token == 6 * of_a_row
    assert cost.shared_bytes_per_pass == index
    assert cost.parameter_bytes_per_token == index + 6 * of_a_row
    assert (cost.table_bytes, cost.weight_bytes) == (64 * of_a_row, index + 64 * of_a_row)
    assert cost.table_training_bytes == 64 * (of_a_row + 2 * 4 * 2 * 16)


def test_a_token_reads_its_own_rows_and_a_share_of_the_rest() -> None:
    peer, dense = (model_cost(LAYERS[kind](), context=1) for kind in ("peer", "dense"))
    assert peer.read_bytes_per_token(1) == peer.parameter_bytes_per_token
    assert peer.read_bytes_per_token(100) == peer.row_bytes_per_token + peer.shared_bytes_per_pass / 100
    assert peer.read_bytes_per_token(10**9) == pytest.approx(6 * 2 * 16 * 4, rel=1e-4)  # the rows dominate
    assert (dense.row_bytes_per_token, dense.table_bytes) == (0, 0)
    assert dense.read_bytes_per_token(100) == 4 * 2 * 16 * 64 / 100


def test_large_experts_are_read_once_by_many_tokens_and_few_by_one() -> None:
    cost = model_cost(LAYERS["token_choice"](), context=1)
    expert = 4 * 2 * 16 * 64
    router = 4 * 16 * 4
    assert cost.read_bytes_per_token(1) == router + 2 * expert
    assert cost.read_bytes_per_token(2) == (router + 4 * expert) / 2
    assert cost.read_bytes_per_token(1000) == (router + 4 * expert) / 1000


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_is_gathered_and_an_output_matrix_is_shared(tied: bool) -> None:
    config = PeerConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, ffw_layers="pkm",
        pkm=PKM_SETTINGS, tie_word_embeddings=tied,
    )  # fmt: skip
    cost = model_cost(PeerForCausalLM(config), context=8)
    assert cost.row_bytes_per_token == 4 * 32 * (6 + (not tied))
    assert cost.parameter_bytes_per_token == cost.row_bytes_per_token + cost.shared_bytes_per_pass
    assert cost.weight_bytes == 4 * cost.total_parameters


def test_a_table_of_which_nobody_says_how_it_is_read_is_named() -> None:
    model = nn.ModuleDict({"pool": Table(4, 8)})
    with pytest.raises(ValueError, match=r"table 'pool'.*looked_up_rows"):
        model_cost(model, context=1)


def test_layers_that_share_a_table_hold_it_once_and_read_it_twice() -> None:
    first, second = LAYERS["pkm"](), LAYERS["pkm"]()
    second.values = first.values
    cost, one = model_cost(nn.ModuleList([first, second]), context=1), model_cost(first, context=1)
    assert cost.table_bytes == one.table_bytes
    assert cost.row_bytes_per_token == 2 * one.row_bytes_per_token
