"""A tokenizer and a float64 model small enough to check by hand."""

from pathlib import Path

import pytest
import torch

from peerlm.data.tokenizer import train_tokenizer
from peerlm.model import PeerConfig, PeerForCausalLM

SENTENCES = (
    "The old keeper climbed the stairs and lit the lamp.",
    "Nobody answered the door, so the keeper went home.",
    "A café, a naïve question, and 12 apples: that was all.",
)


@pytest.fixture(scope="package")
def tokenizer():
    return train_tokenizer(SENTENCES * 3, vocab_size=300)


@pytest.fixture(scope="package")
def model():
    """Two blocks, the second with PEER; large embeddings make predictions differ between positions."""
    torch.manual_seed(1)
    config = PeerConfig(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        ffw_layers=["dense", "peer"],
        peer={"num_experts": 64, "heads": 2, "experts_per_head": 4, "key_dim": 8},
    )
    model = PeerForCausalLM(config).double()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(20)
    return model.eval()


@pytest.fixture(scope="package")
def saved(tmp_path_factory, model, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
