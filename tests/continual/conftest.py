"""A tiny model of one made-up text, and two texts for it to learn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peerlm.continual import LearnConfig
from peerlm.data.tokenizer import train_tokenizer
from peerlm.model import PeerConfig, PeerForCausalLM
from peerlm.train.recipe import from_dict

WORDS = {
    "known": "the cat sat on a mat saw one small bird eat peas as rain fell",
    "code": "def return if else for while in range print import class self not and or",
    "law": "whereas party shall hereby said deed court clause pursuant therein act title",
}
SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
EXPERTS: dict[str, Any] = {"num_experts": 64, "heads": 2, "experts_per_head": 4, "key_dim": 8}


def write_model(folder: Path, texts: dict[str, str], **settings: Any) -> Path:
    """A new model and the tokenizer of these texts."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(texts.values(), vocab_size=300)
    model = PeerForCausalLM(PeerConfig(**{**SIZES, **settings}, eos_token_id=tokenizer.eos_token_id))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files known.txt, code.txt and law.txt, and folders peer/ and dense/ with models."""
    folder = tmp_path_factory.mktemp("texts")
    random = np.random.default_rng(0)
    written = {
        name: "\n<|endoftext|>\n".join(" ".join(random.choice(words.split(), size=30)) for _ in range(30))
        for name, words in WORDS.items()
    }
    for name, text in written.items():
        (folder / f"{name}.txt").write_text(text)
    write_model(folder / "peer", written, ffw_layers="peer", peer=EXPERTS)
    write_model(folder / "dense", written, ffw_layers="dense")
    return folder


@pytest.fixture
def configure(texts: Path, tmp_path: Path) -> Callable[..., LearnConfig]:
    """A stream of two stages, or `only` the first, with divergence and replay, its sections changed by keyword."""
    values: dict[str, Any] = {
        "run": str(tmp_path / "run"),
        "model": str(texts / "peer"),
        "stages": [{"name": name, "text": [str(texts / f"{name}.txt")]} for name in ("code", "law")],
        "memory": {"background": [str(texts / "known.txt")], "kl": 0.5, "kl_windows": 2, "replay": 0.5, "remember": 8},
        "budget": {"steps": 4},
        "optim": {"learning_rate": 1e-2},
        "data": str(tmp_path / "data"),
        "context": 16,
        "batch_size": 4,
        "heldout_windows": 4,
    }

    def build(*, only: int = 2, **changes: Any) -> LearnConfig:
        merged = values | {"stages": values["stages"][:only]}
        for key, change in changes.items():
            merges = isinstance(change, dict) and key not in ("budget", "settings")
            merged[key] = {**values[key], **change} if merges else change
        return from_dict(LearnConfig, merged)

    return build
