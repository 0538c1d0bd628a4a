"""The recipe of a prepared folder: a small model on its text, so that a folder can be trained on before any recipe."""

from pathlib import Path
from typing import Any

from peerlm.data import Manifest
from peerlm.errors import UserError

CONTEXT = 256
"""Tokens in a window, where each split has as many."""
LEAST_CONTEXT = 8


def starter_recipe(folder: Path) -> dict[str, Any]:
    """Nested plain values of a recipe that trains the model of recipes/train-demo.toml on a prepared folder.

    The run is runs/NAME, with the folder's name. Where a split is shorter than a window, windows are shorter.

    Raises:
        UserError: a folder that cannot be read, or a split too short for windows of `LEAST_CONTEXT` tokens.
    """
    splits = Manifest.read(folder).splits
    context = min(CONTEXT, *(split.tokens for split in splits.values()))
    if context < LEAST_CONTEXT:
        name = min(splits, key=lambda name: splits[name].tokens)
        raise UserError(
            f"the {name} split of {folder} has {context} tokens, too few to train with: prepare more text, or a larger "
            "--holdout"
        )
    return {
        "preset": "tuned",
        "run": str(Path("runs") / folder.resolve().name),
        "data": {"folder": str(folder), "context": context, "batch_size": 8},
        "model": {
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "kv_shift": True,
            "peer": {"num_experts": 16384, "pairing": "shells"},
        },
        "budget": {"minutes": 4},
        "eval": {"every": 200},
        "checkpoint": {"minutes": 1.0},
    }
