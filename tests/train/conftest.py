"""A tiny corpus, and a run small enough to train in a test."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peerlm.data import prepare
from peerlm.train import TrainConfig
from peerlm.train.recipe import from_dict

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "saw",
    "one",
    "small",
    "bird",
    "eat",
    "peas",
    "as",
    "rain",
    "fell",
]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of some 10,000 tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)
    documents = [" ".join(random.choice(WORDS, size=60)) for _ in range(100)]
    (folder / "corpus.txt").write_text("\n<|endoftext|>\n".join(documents))
    prepare([folder / "corpus.txt"], folder / "tokens", vocab_size=300, holdout=0.1, progress=False)
    return folder / "tokens"


@pytest.fixture
def recipe(data: Path, tmp_path: Path) -> dict[str, Any]:
    """Plain values of a run with dropout, batch normalisation and accumulation, to change and build from."""
    return {
        "run": str(tmp_path / "run"),
        "data": {"folder": str(data), "context": 16, "batch_size": 4, "micro_batch_size": 2},
        "model": {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "attention_dropout": 0.1,
            "peer": {"num_experts": 64, "heads": 2, "experts_per_head": 2, "key_dim": 8, "dropout": 0.1},
        },
        "budget": {"steps": 8},
        "log": {"every": 2},
        "eval": {"every": 4, "windows": 2, "final_windows": 4},
        "checkpoint": {"every": 3},
    }


@pytest.fixture
def configure(recipe: dict[str, Any]) -> Callable[..., TrainConfig]:
    """A TrainConfig from the recipe, its sections changed by keyword; budget is replaced as a whole."""

    def build(**changes: Any) -> TrainConfig:
        values = dict(recipe)
        for key, change in changes.items():
            merges = isinstance(change, dict) and key != "budget"
            values[key] = {**values.get(key, {}), **change} if merges else change
        return from_dict(TrainConfig, values)

    return build
