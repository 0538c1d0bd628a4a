"""Tiny models of every kind."""

from collections.abc import Callable
from typing import Any

import pytest

from peerlm.model import PeerConfig, PeerForCausalLM

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "peer": {"num_experts": 16, "heads": 2, "experts_per_head": 3, "key_dim": 8},
    "pkm": {"num_values": 16, "heads": 2, "values_per_head": 3, "key_dim": 8},
    "expert_choice": {"num_experts": 4, "hidden": 16},
    "token_choice": {"num_experts": 4, "hidden": 16},
    "fine_grained_moe": {"num_experts": 6, "experts_per_token": 3},
    "hashed_ngrams": {"num_rows": 50, "hashes": 2, "row_dim": 8},
}


@pytest.fixture
def tiny_config() -> Callable[..., PeerConfig]:
    """A function: settings that differ -> PeerConfig."""
    return lambda **settings: PeerConfig(**(TINY | settings))


@pytest.fixture
def tiny_model(tiny_config: Callable[..., PeerConfig]) -> Callable[..., PeerForCausalLM]:
    """A function: settings that differ -> a new model in training mode."""
    return lambda **settings: PeerForCausalLM(tiny_config(**settings)).train()
