"""The choice of experts by TF-IDF, against a computation by hand; what a step leaves alone."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from peerlm.continual import LearnConfig, learn
from peerlm.continual.method import Stage
from peerlm.continual.sparse import BACKGROUND_FILE, Sparse, background_counts, choose_experts, tf_idf
from peerlm.errors import UserError
from peerlm.evaluate import load_model
from peerlm.files import write_bytes
from peerlm.layers.modes import evaluating
from peerlm.model import PeerConfig, PeerForCausalLM
from peerlm.usage import ExpertUsage


def test_scores_are_frequency_times_inverse_background_frequency() -> None:
    scores = tf_idf(torch.tensor([6, 2, 0, 2]), torch.tensor([9, 0, 0, 4]), 9)
    expected = [0.6 * math.log(10 / 10), 0.2 * math.log(10 / 1), 0.0, 0.2 * math.log(10 / 5)]
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64))


def test_the_best_are_chosen_and_none_without_a_score() -> None:
    scores = torch.tensor([0.1, 0.0, 0.3, 0.1, 0.2, -0.0])
    assert choose_experts(scores, 3).tolist() == [True, False, True, False, True, False]
    assert choose_experts(scores, 6).tolist() == [True, False, True, True, True, False]


def test_background_counts_windows_and_not_tokens(texts: Path) -> None:
    model, _ = load_model(texts / "peer")
    windows = torch.randint(300, (5, 12))
    counts, number = background_counts(model, windows)
    assert number == 5
    index = model.get_submodule("model.layers.0.ffw")
    found = []
    handle = index.product_keys.register_forward_hook(lambda module, args, output: found.append(output[1]))
    with evaluating(model):
        for window in windows:
            model(input_ids=window[None])
    handle.remove()
    expected = torch.zeros(64, dtype=torch.int64)
    for ids in found:
        expected[ids.unique()] += 1
    assert torch.equal(counts["model.layers.0.ffw.product_keys"], expected)
    assert len(counts) == 2
    assert 1 < expected.max() <= 5


def test_a_step_moves_the_chosen_rows_alone(configure: Callable[..., LearnConfig]) -> None:
    config = configure(method="sparse", settings={"experts": 3}, budget={"steps": 1})
    learn(config, progress=False)
    before = dict(load_model(config.model)[0].named_parameters())
    after = dict(load_model(Path(config.run) / "stages/1-code/model")[0].named_parameters())
    for name, parameter in before.items():
        if name.endswith("experts.rows"):
            moved = (parameter != after[name]).flatten(1).any(1)
            assert 1 <= moved.sum() <= 3
        else:
            assert torch.equal(parameter, after[name]), name


def test_rows_that_are_not_chosen_again_stay_although_they_had_momentum(configure: Callable[..., LearnConfig]) -> None:
    config = configure()
    start, _ = load_model(config.model)
    rows = [start.get_submodule("model.layers.0.ffw.experts").get_parameter("rows").detach()]
    for steps in (7, 8):
        config = configure(
            method="sparse",
            settings={"experts": 2},
            budget={"steps": steps},
            optim={"schedule": "wsd", "warmup": 0.0, "decay": 0.0},
            run=f"{config.run}-{steps}",
        )
        learn(config, progress=False)
        model, _ = load_model(Path(config.run) / "stages/1-code/model")
        rows.append(model.get_submodule("model.layers.0.ffw.experts").get_parameter("rows").detach())
    assert (rows[0] != rows[1]).flatten(1).any(1).sum() > 2
    assert (rows[1] != rows[2]).flatten(1).any(1).sum() <= 2


def test_without_background_there_is_nothing_to_compare_with(configure: Callable[..., LearnConfig]) -> None:
    config = configure(method="sparse", memory={"background": [], "kl": 0.0, "replay": 0.0})
    with pytest.raises(UserError, match="compares with the use of experts by background text"):
        learn(config, progress=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"experts": 0}, r"sparse\.experts = 0: must be at least 1"),
        ({"windows": 0}, r"sparse\.windows = 0"),
        ({"frozen": ("rows",)}, r"sparse\.frozen has 'rows'; choose of keys, query, rest"),
    ],
)
def test_settings_without_sense(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sparse(**settings)  # type: ignore[arg-type]


def test_layers_that_share_a_table_train_what_any_of_them_chooses(tmp_path: Path) -> None:
    peer = {"num_experts": 16, "heads": 1, "experts_per_head": 2, "key_dim": 8}
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = PeerForCausalLM(PeerConfig(**sizes, ffw_layers="peer", peer=peer, share_tables=True))
    names = [f"model.layers.{block}.ffw.product_keys" for block in range(2)]
    write_bytes(tmp_path / BACKGROUND_FILE, save({name: torch.zeros(16, dtype=torch.int64) for name in names}))
    usage = {name: ExpertUsage(16) for name in names}
    for name, expert in zip(names, (3, 7), strict=True):
        usage[name].retrievals_N[expert] = 1
    rows = model.model.layers[0].ffw.experts.rows
    rows.grad = torch.ones_like(rows)
    Sparse(experts=1).restrict(model, Stage(name="a", folder=tmp_path, seed=0, earlier=None, new=[]), usage, 0)
    assert rows.grad.flatten(1).any(1).nonzero().flatten().tolist() == [3, 7]
