"""Small models with experts, their tokenizer, and a text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peerlm.data.tokenizer import train_tokenizer
from peerlm.model import PeerConfig, PeerForCausalLM
from peerlm.testing import float64

TEXT = (
    "The old keeper climbed the stairs and lit the lamp.\n\nNobody answered the door, so the keeper went home. "
    "A café, a naïve question, and 12 apples: that was all. <script>document.title = 'taken'</script> Ω≈ç√ 灯台 守。"
)

Build = Callable[..., PeerForCausalLM]


def build_model(kind: str = "peer", *, vocab_size: int = 320, **peer: Any) -> PeerForCausalLM:
    torch.manual_seed(1)
    settings = {"num_experts": 64, "heads": 2, "experts_per_head": 4, "key_dim": 8}
    memory = {"num_values": 64, "heads": 2, "values_per_head": 4, "key_dim": 8}
    config = PeerConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=64,
        ffw_layers=["dense", kind, kind],
        peer=settings | (peer if kind == "peer" else {}),
        pkm=memory | (peer if kind == "pkm" else {}),
    )
    model = PeerForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(8)
        model.model.norm.weight.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture
def new_model() -> Build:
    """A function: kind of layer and its settings -> a model whose blocks 1 and 2 have experts."""
    return build_model


@pytest.fixture(scope="package")
def tokenizer():
    return train_tokenizer([TEXT] * 3, vocab_size=320)


@pytest.fixture(scope="package")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="package")
def saved(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """A model in float64 and its tokenizer."""
    folder = tmp_path_factory.mktemp("saved") / "model <b>"
    with float64():
        build_model(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
