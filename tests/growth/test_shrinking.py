"""A layer without the experts that it does not use: the same output, the optimizer's state, and what is saved."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from peerlm.growth import grow, observe, set_opening, shrink
from peerlm.layers import PEER, ProductKeyMemory
from peerlm.model import PeerConfig, PeerForCausalLM
from peerlm.ops.cpu import native
from peerlm.optim import RowAdamW, parameter_groups
from peerlm.testing import assert_within_budget, definition, expert_pairs, float64, state_of

DIM = 8
BACKENDS = ["reference", *([] if native._reason else ["cpu"])]


class Reader(nn.Module):
    """A layer that reads samples by name, as a language model does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.layer(x, mask)


def small(kind: str = "peer", n: int = 7, **changes: Any) -> Reader:
    options = {"heads": 2, "key_dim": 6, **changes}
    if kind == "peer":
        return Reader(PEER(DIM, num_experts=n * n, experts_per_head=3, **options)).eval()
    return Reader(ProductKeyMemory(DIM, num_values=n * n, values_per_head=3, **options)).eval()


def table(model: Reader) -> Tensor:
    layer = model.layer
    return layer.experts.rows if isinstance(layer, PEER) else layer.values.rows


@pytest.mark.parametrize("row_format", ["float32", "bfloat16", "int8", "values"])
@pytest.mark.parametrize("shared_keys", [False, True])
@pytest.mark.parametrize("pairing", ["row-major", "shells"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_what_it_does_not_use_a_layer_says_the_same(
    backend: str, pairing: str, shared_keys: bool, row_format: str
) -> None:
    torch.manual_seed(1)
    options: dict[str, Any] = {"backend": backend, "pairing": pairing, "shared_keys": shared_keys}
    model = small("pkm", **options) if row_format == "values" else small(row_format=row_format, **options)
    x = torch.randn(2, DIM)
    model.layer.product_keys.sub_keys.data[0, :, [1, 4]] = 0.0
    model.layer.product_keys.sub_keys.data[1, :, [0, 6]] = 0.0
    before, rows = model(x), table(model).detach().clone()
    weights, ids = model.layer.product_keys(x)
    judge = definition(model)
    exact, (exact_weights, _) = judge(x.double()), judge.layer.product_keys(x.double())
    usage = observe(model, [{"x": x}]).usage
    kept = shrink(model, usage=usage)["layer.product_keys"]
    n = model.layer.product_keys.sub_keys.shape[2]
    assert n < 7
    assert table(model).shape[0] == n * n == len(kept) == model.layer.product_keys.num_experts
    assert torch.equal(table(model), rows[kept])
    assert_within_budget(model(x), before, exact)
    if backend == "cpu":
        assert torch.equal(model(x), before)
    weights_after, ids_after = model.layer.product_keys(x)
    assert torch.equal(kept[ids_after], ids)
    assert_within_budget(weights_after, weights, exact_weights)


def test_the_least_used_sub_keys_of_each_half_go() -> None:
    model = small(n=4, pairing="shells")
    pairs = expert_pairs(4, "shells")
    usage = torch.zeros(2, 16)
    for head, pair, count in ((0, (3, 0), 5), (1, (1, 2), 4), (0, (0, 2), 3), (1, (2, 3), 1)):
        usage[head, pairs.index(pair)] = count
    keys = model.layer.product_keys.sub_keys.detach().clone()
    kept = shrink(model, 9, usage={"layer.product_keys": usage})["layer.product_keys"]
    first, second = [0, 1, 3], [0, 2, 3]  # counts 3, 4, 1, 5 and 5, 0, 7, 1
    assert torch.equal(model.layer.product_keys.sub_keys, torch.stack([keys[0][:, first], keys[1][:, second]]))
    assert [pairs[i] for i in kept.tolist()] == [(first[i], second[j]) for i, j in expert_pairs(3, "shells")]


@pytest.mark.parametrize("optimizer", ["AdamW", "RowAdamW", "lazy"])
def test_the_optimizer_goes_on_with_its_state(optimizer: str) -> None:
    torch.manual_seed(0)
    model = small().train()
    groups = parameter_groups(model)
    trains: torch.optim.Optimizer
    if optimizer == "AdamW":
        trains = torch.optim.AdamW(groups, lr=0.01)
    else:
        trains = RowAdamW(groups, lr=0.01, lazy=optimizer == "lazy")

    def step(model: nn.Module, x: Tensor, trains: torch.optim.Optimizer) -> None:
        trains.zero_grad()
        (model(x) - x).square().mean().backward()
        trains.step()

    for _ in range(4):
        step(model, torch.randn(3, DIM), trains)
    model.eval()
    moments = copy.deepcopy(state_of(trains, model.layer.experts))
    keys_moments = copy.deepcopy(trains.state[model.layer.product_keys.sub_keys]["exp_avg"])
    usage = torch.arange(49.0)
    kept = shrink(model, 16, usage={"layer.product_keys": usage}, optimizer=trains)["layer.product_keys"]
    after = state_of(trains, model.layer.experts)
    for name in ("exp_avg", "exp_avg_sq", *(["weights_step"] if optimizer == "RowAdamW" else [])):
        assert torch.equal(after[name], moments[name][kept])
    half = trains.state[model.layer.product_keys.sub_keys]["exp_avg"][1]
    assert all(any(torch.equal(each, old) for old in keys_moments[1, 0]) for each in half[0])
    held = {id(parameter) for group in trains.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}
    before = table(model).detach().clone()
    model.train()
    step(model, torch.randn(9, DIM), trains)
    model.eval()
    assert not torch.equal(table(model), before)


@pytest.mark.parametrize("kind", ["peer", "pkm"])
def test_a_model_that_shrank_and_grew_is_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"heads": 2, "key_dim": 8, "pairing": "shells"}
    settings |= {"num_experts": 49, "experts_per_head": 3} if kind == "peer" else {"num_values": 49}
    settings |= {"values_per_head": 3} if kind == "pkm" else {}
    config = PeerConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffw_layers=kind, **{kind: settings}
    )
    model, ids = PeerForCausalLM(config).eval(), torch.randint(64, (2, 9))
    observed = observe(model, [{"input_ids": ids}])
    assert sorted(observed.usage) == [f"model.layers.{layer}.ffw.product_keys" for layer in range(2)]
    shrink(model, 25, usage=observed.usage)
    size = "num_experts" if kind == "peer" else "num_values"
    assert getattr(model.config, kind)[size] == 25
    before = model(ids).logits
    grow(model, 64)
    assert torch.equal(model(ids).logits, before)
    set_opening(model, 0.5)
    logits = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = PeerForCausalLM.from_pretrained(tmp_path).eval()
    assert getattr(loaded.config, kind) | {size: 64, "grown_from": 25} == getattr(loaded.config, kind)
    assert torch.equal(loaded(ids).logits, logits)


@settings(deadline=None, max_examples=25)
@given(
    steps=st.lists(st.sampled_from(["grow", "open", "shrink", "save"]), min_size=1, max_size=6),
    seed=st.integers(0, 99),
    gated=st.booleans(),
)
def test_any_sequence_of_changes_keeps_what_it_promises(
    steps: list[str], seed: int, gated: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    torch.manual_seed(seed)
    experts = {"num_experts": 25, "heads": 2, "experts_per_head": 2, "key_dim": 8, "pairing": "shells", "gated": gated}
    config = PeerConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, peer=experts)
    model, ids = PeerForCausalLM(config).eval(), torch.randint(32, (1, 4))
    for step in steps:
        index = model.model.layers[0].ffw.product_keys
        before = model(ids).logits
        if step == "grow" and index.opening is None:
            grow(model, (index.sub_keys.shape[2] + 2) ** 2, seed=seed)
            assert torch.equal(model(ids).logits, before)
        elif step == "open":
            set_opening(model, 1)
        elif step == "shrink" and index.opening is None:
            shrink(model, usage=observe(model, [{"input_ids": ids}]).usage)
            with float64():
                exact = definition(model)(ids).logits
            assert_within_budget(model(ids).logits, before, exact)
        elif step == "save":
            folder = tmp_path_factory.mktemp("model")
            model.save_pretrained(folder)
            model = PeerForCausalLM.from_pretrained(folder).eval()
            assert torch.equal(model(ids).logits, before)


@pytest.mark.usefixtures("float64")
def test_padding_is_not_observed() -> None:
    model, x = small(), torch.randn(2, 5, DIM)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    alone = observe(model, [{"x": x[:1]}, {"x": x[1:, :2]}])
    batch = observe(model, [{"x": x, "mask": mask}])
    assert torch.equal(batch.usage["layer.product_keys"], alone.usage["layer.product_keys"])
    assert batch.usage["layer.product_keys"].sum() == 7 * 2 * 3
    torch.testing.assert_close(batch.queries["layer.product_keys"], alone.queries["layer.product_keys"])
    few = observe(model, [{"x": x}, {"x": x}], max_queries=7)
    assert few.queries["layer.product_keys"].shape == (7, 2, 6)


@pytest.mark.parametrize(
    ("num_experts", "usage", "message"),
    [
        (16, None, "usage has no counts of 'layer.product_keys'"),
        (16, torch.ones(48), "give one count for each expert"),
        (16, torch.zeros(49), "not all of them 0"),
        (64, torch.ones(49), "num_experts is 64, but layer 'layer' has 49; give a smaller square"),
        (15, torch.ones(49), "num_experts is 15, which is not a square number"),
        (4, torch.ones(49), "experts_per_head is 3, more than the 2 sub-keys per half"),
    ],
)
def test_what_cannot_shrink_is_refused(num_experts: int, usage: Tensor | None, message: str) -> None:
    model = small()
    with pytest.raises(ValueError, match=message):
        shrink(model, num_experts, usage={} if usage is None else {"layer.product_keys": usage})
    assert len(table(model)) == 49


def test_a_layer_that_is_not_open_and_a_model_without_one_are_refused() -> None:
    model = grow(small(pairing="shells"), 81)
    with pytest.raises(
        ValueError, match=r"grew from 49 experts and is open at 0: set_opening\(model, 1\) before it shr"
    ):
        shrink(model, 16, usage={"layer.product_keys": torch.ones(81)})
    with pytest.raises(ValueError, match="Linear has no PEER layer and no product-key memory"):
        shrink(nn.Linear(2, 2), 16, usage={})
    with pytest.raises(ValueError, match="no samples to observe"):
        observe(model, [])
