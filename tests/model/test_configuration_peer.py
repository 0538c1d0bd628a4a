"""What a configuration fills in, keeps, and refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from peerlm.model import PeerConfig


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [(1, ["peer"]), (2, ["dense", "peer"]), (3, ["dense", "peer", "dense"])],
)
def test_the_middle_block_is_peer_by_default(blocks: int, expected: list[str]) -> None:
    assert PeerConfig(num_hidden_layers=blocks).ffw_layers == expected


def test_one_kind_for_all_blocks_or_one_each() -> None:
    assert PeerConfig(num_hidden_layers=2, ffw_layers="pkm").ffw_layers == ["pkm", "pkm"]
    assert PeerConfig(num_hidden_layers=2, ffw_layers=["swiglu", "peer"]).ffw_layers == ["swiglu", "peer"]


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (1, ["pkm"]),
        (3, ["pkm"] * 3),
        (4, ["dense", "pkm", "pkm", "dense"]),
        (6, ["dense", *["pkm"] * 4, "dense"]),
        (12, [*["dense"] * 3, *["pkm"] * 6, *["dense"] * 3]),
    ],
)
def test_a_kind_in_the_inner_blocks(blocks: int, expected: list[str]) -> None:
    assert PeerConfig(num_hidden_layers=blocks, ffw_layers="pkm:inner").ffw_layers == expected


def test_sizes_that_follow_from_others() -> None:
    config = PeerConfig(hidden_size=96, num_attention_heads=6)
    assert (config.num_key_value_heads, config.head_dim) == (6, 16)


def test_round_trip(tiny_config: Callable[..., PeerConfig], tmp_path: Path) -> None:
    config = tiny_config(num_key_value_heads=2, ffw_layers=["dense", "pkm", "peer"], tie_word_embeddings=False)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, PeerConfig)
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
    assert loaded.peer == {"num_experts": 16, "heads": 2, "experts_per_head": 3, "key_dim": 8}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 0}, "vocab_size is 0; it must be at least 1"),
        ({"hidden_size": 0}, "hidden_size is 0; it must be at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be at least 1"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1; it must be at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be at least 1"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0; it must be at least 1"),
        ({"intermediate_size": 0}, "intermediate_size is 0; it must be at least 1"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0; it must be at least 1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; it must divide num_attention_heads = 4"),
        (
            {"hidden_size": 28},
            "head_dim is 7; .* hidden_size = 28 to an even multiple of num_attention_heads = 4",
        ),
        ({"hidden_size": 3}, "head_dim is 0; .* an even number of at least 2"),
        ({"ffw_layers": ["peer"]}, "ffw_layers names 1 blocks; num_hidden_layers is 3: name each"),
        ({"ffw_layers": "moe"}, "ffw_layers has 'moe'; choose from dense, swiglu, peer, pkm, expert_choice"),
        ({"ffw_layers": "peer+moe"}, "ffw_layers has 'moe'; choose from dense, swiglu, peer, pkm, expert_choice"),
        ({"ffw_layers": "peer+peer"}, r"ffw_layers has 'peer\+peer'; a layer can be beside those of other kinds only"),
        ({"parallel_intermediate_size": 0}, "parallel_intermediate_size is 0; it must be at least 1"),
        ({"ffw_init_scale": [1.0]}, "ffw_init_scale has 1 numbers; num_hidden_layers is 3: give one for each block"),
        ({"ffw_init_scale": {"peer": 1.0}}, "ffw_init_scale has no number for 'dense', which ffw_layers has; add it"),
        ({"ffw_init_scale": {"perr": 1.0}}, "ffw_init_scale names 'perr'; choose from dense, swiglu, peer"),
        ({"ffw_output_gate": "expert"}, "ffw_output_gate is 'expert'; choose one of token, feature, or None"),
        ({"kv_shift_init": "own"}, "kv_shift_init is 'own'; choose one of none, spread"),
        ({"kv_shift_init": "spread"}, "kv_shift_init is 'spread', but kv_shift is false: set that to true, or leave"),
        ({"parallel_intermediate_size": 8}, "parallel_intermediate_size is 8, but no block of ffw_layers has a dense"),
        ({"share_tables": True}, "share_tables is true, but no two blocks of ffw_layers have the same of peer, pkm"),
        ({"ffw_init_scale": -1.0}, "ffw_init_scale has -1.0; give finite numbers of at least 0"),
        ({"peer": {"num_expert": 4}}, "peer has no setting 'num_expert'; did you mean 'num_experts'?"),
        (
            {"token_choice": {"zzz": 4}},
            "token_choice has no setting 'zzz'; choose from num_experts, experts_per_token",
        ),
        ({"pkm": {"dim": 4}}, "pkm has no setting 'dim'"),
        ({"hidden_size": "wide"}, "'hidden_size' expected int, got str"),
        ({"ffw_layers": "moe:inner"}, "ffw_layers has 'moe'; choose from dense, swiglu, peer, pkm, expert_choice"),
        ({"ffw_layers": "peer:outer"}, "ffw_layers has 'peer:outer'; choose from dense, swiglu, peer, pkm"),
        ({"ffw_layers": 5}, "'ffw_layers' with value 5"),
    ],
    ids=str,
)
def test_impossible_settings(tiny_config: Callable[..., PeerConfig], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StrictDataclassError, match=f"(?s){message}"):
        tiny_config(**settings)


@pytest.mark.parametrize("kind", ["peer", "pkm"])
def test_pairing_reaches_the_layer(tiny_model: Callable[..., Any], kind: str) -> None:
    size = {"peer": "num_experts", "pkm": "num_values"}[kind]
    per_head = {"peer": "experts_per_head", "pkm": "values_per_head"}[kind]
    settings = {size: 16, per_head: 3, "pairing": "shells"}
    model = tiny_model(ffw_layers=kind, num_hidden_layers=1, **{kind: settings})
    assert model.model.layers[0].ffw.product_keys.pairing == "shells"


def test_impossible_settings_of_a_layer_are_refused_by_the_layer(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="num_experts is 15, which is not a square number"):
        tiny_model(peer={"num_experts": 15})
