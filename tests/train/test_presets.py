"""A preset is what a recipe starts from; the recipe's own keys win."""

from pathlib import Path

import pytest

from peerlm import UserError
from peerlm.layers import PEER, HashedNgrams
from peerlm.model import PeerConfig, PeerForCausalLM
from peerlm.train import load_recipe
from peerlm.train.presets import PRESETS, merge
from peerlm_studies.comparison.plan import load_plan

RECIPE = """
run = "out"
{preset}
[data]
folder = "tokens"
[budget]
steps = 3
[model]
hidden_size = 32
peer = {{ heads = 2 }}
"""
ROOT = Path(__file__).parents[2]


def recipe(tmp_path: Path, preset: str = "") -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(preset=preset))
    return path


@pytest.mark.parametrize("in_file", [True, False])
def test_own_keys_win_over_the_preset(tmp_path: Path, in_file: bool) -> None:
    path = recipe(tmp_path, 'preset = "tuned"' if in_file else "")
    config = load_recipe(path, ["optim.keys_lr_multiplier=2.0", *([] if in_file else ["preset=tuned"])])
    assert config.model["peer"] == {**PRESETS["tuned"]["model"]["peer"], "heads": 2}
    assert config.model["hidden_size"] == 32
    assert config.model["ffw_layers"] == "peer:inner"
    assert config.optim.table_lr_multiplier == 0.25
    assert config.optim.keys_lr_multiplier == 2.0
    assert load_recipe(recipe(tmp_path)).model == {"hidden_size": 32, "peer": {"heads": 2}}


def test_a_method_of_a_comparison_may_have_one(tmp_path: Path) -> None:
    """In every block it is the run that recipes/compare.toml spells out, whose row counts."""
    compared = load_plan(ROOT / "recipes/compare.toml")
    text = (ROOT / "recipes/compare.toml").read_text(encoding="utf-8").split("[methods.PEER]")[0]
    path = tmp_path / "compare.toml"
    path.write_text(
        text + '[methods.PEER]\npreset = "tuned"\nmodel.ffw_layers = "peer"\n'
        '[methods.small]\npreset = "tuned"\nmodel.peer.heads = 2\n'
    )
    tuned, small = load_plan(path).runs[:2]
    spelled_out = next(run for run in compared.runs if run.method == "PEER")
    assert tuned.key(compared.compare) == spelled_out.key(compared.compare)
    assert small.train.model["peer"]["heads"] == 2
    assert PRESETS["tuned"]["model"]["peer"]["heads"] == 1


def test_few_experts_are_a_quarter_of_the_tuned_ones_from_a_table_four_times_as_large() -> None:
    few, tuned = PRESETS["few-experts"]["model"]["peer"], PRESETS["tuned"]["model"]["peer"]
    assert (few["experts_per_head"], few["num_experts"]) == (16, 512**2)
    assert (tuned["experts_per_head"], tuned["num_experts"]) == (64, 256**2)
    names = "experts_per_head", "num_experts"
    assert merge(few, {name: tuned[name] for name in names}) == tuned
    assert merge(PRESETS["few-experts"], {"model": PRESETS["tuned"]["model"]}) == PRESETS["tuned"]


def test_bigrams_stand_beside_few_experts_and_a_model_is_built() -> None:
    few, both = PRESETS["few-experts"], PRESETS["with-bigrams"]
    assert both["optim"] == few["optim"]
    assert both["model"]["peer"] == few["model"]["peer"]
    small = merge(
        both["model"],
        {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 32}
        | {"peer": {"num_experts": 256}, "hashed_ngrams": {"num_rows": 64}},
    )
    model = PeerForCausalLM(PeerConfig(**small))
    kinds = [[type(part).__name__ for part in layer.modules()] for layer in model.model.layers]
    assert [("HashedNgrams" in own, "PEER" in own) for own in kinds] == [(False, False)] + 2 * [(True, True)] + [
        (False, False)
    ]
    ngrams = next(part for part in model.modules() if isinstance(part, HashedNgrams))
    # What is read moves by 80 times what matrices do.
    assert ngrams.weight_scale * both["optim"]["table_lr_multiplier"] == 80


def test_presets_are_settings_of_the_layer() -> None:
    layer = PEER(8, **merge(PRESETS["tuned"]["model"]["peer"], {"num_experts": 64**2}))
    assert layer.weight_scale == 256.0
    paper = PRESETS["paper"]["model"]["peer"]
    defaults = PEER.__init__.__kwdefaults__
    assert {name: defaults[name] for name in paper} == paper


@pytest.mark.parametrize("where", ["", "methods.PEER."])
def test_a_preset_that_is_not_there_is_named(tmp_path: Path, where: str) -> None:
    path = recipe(tmp_path, "" if where else 'preset = "best"')
    if where:
        path.write_text(path.read_text() + '[methods.PEER]\npreset = "best"\n')
    with pytest.raises(
        UserError, match=f"^{where}preset = 'best': choose from paper, tuned, few-experts, with-bigrams$"
    ):
        load_plan(path)
