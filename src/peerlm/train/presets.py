"""Presets: settings that a recipe may start from by name, `preset = "tuned"`; its own keys win over them."""

import copy
from collections.abc import Mapping
from typing import Any

from peerlm.errors import UserError


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested plain values with changes, section by section; neither is changed."""
    merged = dict(base)
    for key, value in changes.items():
        inner = merged.get(key)
        merged[key] = merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


PRESETS: dict[str, dict[str, Any]] = {
    # He 2024, section 3.1; where the model does not say which layers are PEER, the middle one is, as in the paper.
    "paper": {
        "model": {
            "peer": {
                "num_experts": 1024**2,
                "heads": 8,
                "experts_per_head": 16,
                "shared_keys": True,
                "query_norm": "batch",
                "weighting": "softmax",
                "weight_scale": 1.0,
            },
        },
    },
    # The best of recipes/tune.toml, tune_scale.toml, tune_index.toml, tune_heads.toml, tune_pool.toml, tune_keys.toml
    # and ablations/blocks.toml, as recipes/isoflop.toml has; docs/results.md has a row for each setting.
    "tuned": {
        "model": {
            "ffw_layers": "peer:inner",
            "ffw_init_scale": 1.0,
            "peer": {
                "num_experts": 256**2,
                "heads": 1,
                "experts_per_head": 64,
                "key_dim": 32,
                "shared_keys": False,
                "query_norm": "batch",
                "key_norm": True,
                "activation": "one_plus",
                "weight_scale": 256.0,
            },
        },
        "optim": {"learning_rate": 6e-3, "keys_lr_multiplier": 0.25, "table_lr_multiplier": 0.25},
    },
}
"""Sections of a recipe by the preset's name."""

# About the loss of "tuned", for a quarter of the bytes of rows and four times the memory (docs/frontier.md).
PRESETS["few-experts"] = merge(PRESETS["tuned"], {"model": {"peer": {"num_experts": 512**2, "experts_per_head": 16}}})

# Bigrams beside each layer of PEER, their rows at 80 times the rate of matrices: 320 times that of tables, which is a
# quarter. Below PEER alone at equal seconds with kv_shift (recipes/seconds_shifted.toml, "twice").
PRESETS["with-bigrams"] = merge(
    PRESETS["few-experts"],
    {
        "model": {
            "ffw_layers": "hashed_ngrams+peer:inner",
            "ffw_init_scale": {"dense": 1.0, "peer": 1.0, "hashed_ngrams": 3.0},
            "hashed_ngrams": {"num_rows": 512**2, "orders": [2], "weight_scale": 320.0},
        }
    },
)


def with_preset(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested plain values on top of the preset that their key `preset` names; the key is gone.

    `prefix` goes before the key in messages. Raises UserError where there is no such preset.
    """
    values = dict(values)
    name = values.pop("preset", None)
    if name is None:
        return values
    if name not in PRESETS:
        raise UserError(f"{prefix}preset = {name!r}: choose from {', '.join(PRESETS)}")
    return merge(copy.deepcopy(PRESETS[name]), values)
