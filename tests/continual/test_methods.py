"""What each method leaves of a stage: parts that are frozen keep their bits, and the next stage starts from it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peerlm.continual import LearnConfig, learn
from peerlm.continual.method import freeze
from peerlm.continual.methods import METHODS, method_of
from peerlm.convert.rows import convert_rows_of_folder
from peerlm.data import TokenShards, TokenWindows
from peerlm.errors import UserError
from peerlm.evaluate import held_out_loss, load_model
from peerlm.growth import to_shells
from peerlm.packs.api import load_pack, loaded_packs

from .conftest import EXPERTS, WORDS, write_model

SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2},
    "grow": {"sub_keys": 2},
    "pack": {"experts": 16},
    "pool": {"num_experts": 16, "key_dim": 8},
}


def weights(folder: str | Path) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in load_model(folder)[0].named_parameters()}


@pytest.mark.parametrize("method", METHODS)
def test_each_method_learns_both_texts(method: str, configure: Callable[..., LearnConfig]) -> None:
    config = configure(
        method=method,
        settings=SETTINGS.get(method, {}),
        budget={"steps": 12},
        optim={"learning_rate": 3e-2},
        memory={"kl": 0.1},
    )
    before, *stages = learn(config, progress=False)
    assert before["stage"] is None
    assert [stage["stage"] for stage in stages] == ["code", "law"]
    for stage in stages:
        assert stage["loss"][stage["stage"]] < before["loss"][stage["stage"]]
        assert stage["perplexity"] == {name: math.exp(loss) for name, loss in stage["loss"].items()}
        assert stage["steps"] == 12
        assert stage["tokens"] == 12 * 4 * 16
        assert stage["peak_memory_bytes"] > 2**26  # PyTorch alone takes as much


def test_growth_keeps_old_rows_old_keys_and_all_the_rest(configure: Callable[..., LearnConfig], texts: Path) -> None:
    config = configure(method="grow", settings={"sub_keys": 2})
    learn(config, progress=False)
    old = load_model(texts / "peer")[0]
    to_shells(old)
    after = weights(Path(config.run) / "stages/2-law/model")
    moved = 0
    for name, parameter in old.named_parameters():
        if name.endswith("experts.rows"):
            assert len(after[name]) == 12**2
            assert torch.equal(after[name][:64], parameter)
            moved += int((after[name][64:, 1] != 0).any())
        elif name.endswith("sub_keys"):
            assert torch.equal(after[name][:, :, :8], parameter)
        else:
            assert torch.equal(after[name], parameter), name
    assert moved == 2


def test_growth_may_train_the_rest(configure: Callable[..., LearnConfig], texts: Path) -> None:
    config = configure(method="grow", settings={"sub_keys": 2, "frozen": ["rows", "keys", "query"]})
    learn(config, progress=False)
    old, after = weights(texts / "peer"), weights(Path(config.run) / "stages/2-law/model")
    moved = {name for name in old if after[name].shape == old[name].shape and not torch.equal(after[name], old[name])}
    assert "model.embed_tokens.weight" in moved
    assert not any("query" in name for name in moved)


def test_a_pack_leaves_the_model_alone_and_is_loaded_again(configure: Callable[..., LearnConfig], texts: Path) -> None:
    config = configure(method="pack", settings={"experts": 16})
    rows = learn(config, progress=False)
    model, _ = load_model(texts / "peer")
    ids = torch.arange(12)[None]
    plain = model(input_ids=ids).logits
    for stage in ("1-code", "2-law"):
        assert not (Path(config.run) / "stages" / stage / "model").exists()
        load_pack(model, Path(config.run) / "stages" / stage / "pack")
    assert loaded_packs(model) == ["code", "law"]
    assert not torch.equal(model(input_ids=ids).logits, plain)
    assert rows[1]["trained_parameters"] == 2 * (2 * 2 * 4 * 4 + 16 * 2 * 16) - 2 * (2 * 4 * 4)  # one set of keys


def test_lora_is_merged(configure: Callable[..., LearnConfig], texts: Path) -> None:
    config = configure(method="lora", settings={"rank": 2})
    learn(config, progress=False)
    old, after = weights(texts / "peer"), weights(Path(config.run) / "stages/1-code/model")
    assert old.keys() == after.keys()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.linalg.matrix_rank(after[name] - old[name], rtol=1e-4) == 2
    assert torch.equal(after["model.embed_tokens.weight"], old["model.embed_tokens.weight"])
    assert torch.equal(after["model.layers.0.ffw.experts.rows"], old["model.layers.0.ffw.experts.rows"])


@pytest.mark.parametrize("model", ["peer", "dense"])
def test_a_pool_leaves_the_model_alone_and_is_trained_from_stage_to_stage(
    model: str, configure: Callable[..., LearnConfig], texts: Path
) -> None:
    config = configure(method="pool", settings=SETTINGS["pool"], model=str(texts / model), heldout_windows=None)
    rows = learn(config, progress=False)
    base = weights(texts / model)
    stages = [Path(config.run) / "stages" / name / "adapter" for name in ("1-code", "2-law")]
    after = [weights(folder) for folder in stages]
    for found in after:
        kept = {name.replace(".base_layer", ""): each for name, each in found.items() if "peer_adapter" not in name}
        assert kept.keys() == base.keys()
        assert all(torch.equal(kept[name], base[name]) for name in base)
    pools = [name for name in after[0] if "peer_adapter" in name]
    assert rows[1]["trained_parameters"] == sum(after[0][name].numel() for name in pools)
    tables = [name for name in pools if name.endswith("up.rows")]
    assert len(tables) == 2
    for name in tables:  # zero at the start, and not begun again
        first, second = (found[name] for found in after)
        assert 0 < (second - first).norm() < second.norm()
        assert first.any()
    heldout = TokenWindows(TokenShards(Path(str(config.data)) / "law", "heldout"), 16)
    for folder, row in zip(stages, rows[1:], strict=True):
        loaded, _ = load_model(folder)
        assert held_out_loss(loaded, heldout, batch_size=8) == pytest.approx(row["loss"]["law"], rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_experts": 15}, "no pool of these settings fits the model: num_experts"),
        ({"num_experts": -4}, "no pool of these settings fits the model: num_experts is -4"),
        ({"target_modules": ["nowhere"]}, "no pool of these settings fits the model: "),
        ({"rate": 0}, r"pool.rate = 0.0: must be above 0"),
        ({"slices": 3}, "slices"),
    ],
)
def test_settings_of_a_pool_that_cannot_be_say_so(
    settings: dict[str, Any], says: str, configure: Callable[..., LearnConfig]
) -> None:
    with pytest.raises(UserError, match=says):
        learn(configure(method="pool", settings=settings), progress=False)


@pytest.mark.parametrize("method", ["grow", "sparse"])
def test_methods_of_experts_refuse_a_model_without(
    method: str, configure: Callable[..., LearnConfig], texts: Path
) -> None:
    with pytest.raises(UserError, match="has no PEER layers, whose experts this method trains: choose --method full"):
        learn(configure(method=method, model=str(texts / "dense")), progress=False)


@pytest.mark.parametrize("method", ["full", "grow", "sparse"])
def test_experts_that_are_not_trained_are_refused(
    method: str, configure: Callable[..., LearnConfig], texts: Path, tmp_path: Path
) -> None:
    convert_rows_of_folder(texts / "peer", tmp_path / "int8", "int8")
    with pytest.raises(UserError, match=r"ffw are stored as int8, in which no method trains them"):
        learn(configure(method=method, model=str(tmp_path / "int8")), progress=False)


@pytest.mark.parametrize("row_format", ["int8", "int4"])
@pytest.mark.parametrize("method", ["pack", "lora", "pool"])
def test_rows_of_few_bits_stay_as_they_are_beside_what_is_trained(
    method: str, row_format: str, configure: Callable[..., LearnConfig], texts: Path, tmp_path: Path
) -> None:
    base = texts / "peer"
    if row_format == "int4":  # whose groups are of 32
        written = {name: (texts / f"{name}.txt").read_text() for name in WORDS}
        base = write_model(tmp_path / "wide", written, hidden_size=32, ffw_layers="peer", peer=EXPERTS)
    convert_rows_of_folder(base, tmp_path / "base", row_format)
    config = configure(only=1, method=method, model=str(tmp_path / "base"), budget={"steps": 2})
    learn(config, progress=False)
    if method == "pack":  # refused beside another base
        load_model(tmp_path / "base", [Path(config.run) / "stages" / "1-code" / "pack"])


@pytest.mark.parametrize("method", ["full", "lora", "pool"])
def test_other_methods_take_any_model(method: str, configure: Callable[..., LearnConfig], texts: Path) -> None:
    config = configure(method=method, model=str(texts / "dense"), budget={"steps": 1})
    assert len(learn(config, progress=False)) == 3


def test_a_batch_norm_of_queries_keeps_its_statistics_where_old_experts_are_frozen() -> None:
    from peerlm import PEER

    for name, moves in (("full", True), ("sparse", False), ("pack", False)):
        layer = PEER(8, num_experts=16, heads=1, experts_per_head=2, key_dim=4)
        before = layer.product_keys.query_norm.running_mean.clone()  # type: ignore[union-attr, operator]
        if name == "pack":  # freezes all that is there, query norms included
            freeze(layer)
        method_of(name, {}).train_mode(layer)
        layer(torch.randn(30, 8) + 3)
        assert torch.equal(layer.product_keys.query_norm.running_mean, before) != moves, name  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("magic", {}, "there is no method 'magic'; choose one of full, lora, grow, pack, pool, sparse"),
        ("grow", {"sub_key": 3}, "unknown key 'grow.sub_key': did you mean 'grow.sub_keys'"),
        ("lora", {"rank": "two"}, "lora.rank = 'two': expected an integer"),
        ("full", {"rank": 2}, "method full has no settings, but rank is given"),
    ],
)
def test_methods_and_settings_that_do_not_exist(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        method_of(name, settings)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("grow", {"sub_keys": 0}, "the model cannot grow so: num_experts is 64"),
        ("grow", {"frozen": ["all"]}, "the model cannot grow so: what has 'all'"),
        ("pack", {"experts": 15}, "no pack can be made for 'code': num_experts is 15"),
        ("lora", {"target_modules": ["nowhere"]}, "no LoRA of these settings fits the model"),
    ],
)
def test_settings_that_do_not_fit_the_model(
    method: str, settings: dict[str, Any], message: str, configure: Callable[..., LearnConfig]
) -> None:
    with pytest.raises(UserError, match=message):
        learn(configure(method=method, settings=settings), progress=False)
