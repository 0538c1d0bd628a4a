"""Growth keeps a layer's function, its optimizer's state, and what is saved of it."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from peerlm.convert import convert
from peerlm.growth import grow, set_opening, shrink, to_shells
from peerlm.layers import PEER, ProductKeyMemory
from peerlm.model import PeerConfig, PeerForCausalLM
from peerlm.ops.cpu import native
from peerlm.ops.functions import WEIGHTINGS
from peerlm.ops.row_updates import rows_as_they_are
from peerlm.optim import RowAdamW, parameter_groups
from peerlm.optim.replace import replace_parameters
from peerlm.testing import (
    assert_within_budget,
    definition,
    exhaustive_scores,
    expert_pairs,
    gradient_of,
    state_of,
)
from peerlm.usage import record_usage

DIM = 8
BACKENDS = ["reference", *([] if native._reason else ["cpu"])]


def small_peer(**changes: Any) -> PEER:
    return PEER(
        DIM, **{"num_experts": 16, "heads": 3, "experts_per_head": 3, "key_dim": 6, "pairing": "shells"} | changes
    )


def tokens(count: int = 20) -> Tensor:
    return torch.randn(count, DIM)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) and a.dtype == b.dtype


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("row_format", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("shared_keys", [False, True])
@pytest.mark.parametrize("key_norm", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_growth_keeps_every_bit_of_the_output(
    backend: str, key_norm: bool, shared_keys: bool, row_format: str, training: bool
) -> None:
    layer = small_peer(
        backend=backend, key_norm=key_norm, shared_keys=shared_keys, row_format=row_format, gated=training
    ).train(training)
    for count in (1, 3, 20):
        before, x = copy.deepcopy(layer), tokens(count)
        grown = grow(copy.deepcopy(layer), 49)
        assert same_bits(grown(x), before(x))
        assert grown.experts.rows.shape[0] == grown.experts.num_experts == grown.product_keys.num_experts == 49
        assert grown.experts.rows.dtype == layer.experts.rows.dtype


@pytest.mark.parametrize("row_format", ["float32", "bfloat16", "int8", "float8_e4m3fn"])
def test_old_rows_and_keys_stay_and_new_ones_are_as_at_initialisation(row_format: str) -> None:
    old = PEER(64, num_experts=64, key_dim=8, experts_per_head=4, gated=True, pairing="shells", row_format=row_format)
    new = grow(copy.deepcopy(old), 60**2)
    assert same_bits(new.experts.rows[:64], old.experts.rows)
    assert same_bits(new.product_keys.sub_keys[:, :, :8], old.product_keys.sub_keys)
    for part in (new.experts.down, new.experts.gate):
        assert part is not None
        assert part[64:].float().std().item() == pytest.approx(64**-0.5, rel=0.01)
        assert part[64:].float().abs().amin(dim=0).min() < part[64:].float().abs().amax(dim=0).min()
    assert new.experts.up[64:].count_nonzero() == 0
    fresh = new.product_keys.sub_keys[:, :, 8:]
    assert fresh.abs().max() <= 4**-0.5
    assert fresh.std().item() == pytest.approx((4 * 3) ** -0.5, rel=0.1)
    if new.experts.scales is not None:
        assert same_bits(new.experts.scales[:64], old.experts.scales)
        assert new.experts.scales[64:, 1].count_nonzero() == 0


def test_growth_is_a_function_of_its_seed_alone() -> None:
    layer = small_peer()
    state = torch.random.get_rng_state()
    grown = [grow(copy.deepcopy(layer), 64, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    for name in ("experts.rows", "product_keys.sub_keys"):
        first, same, other = (layer.state_dict()[name] for layer in grown)
        assert torch.equal(first, same)
        assert not torch.equal(first, other)


@pytest.mark.parametrize("weighting", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("opening", [1e-30, 0.01, 0.5, 0.999])
@pytest.mark.parametrize(("shared_keys", "key_norm"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_partly_open_layer_weighs_new_halves_by_its_opening(
    backend: str, shared_keys: bool, key_norm: bool, opening: float, weighting: str
) -> None:
    settings: dict[str, Any] = {"shared_keys": shared_keys, "key_norm": key_norm, "weighting": weighting}
    layer = grow(small_peer(backend=backend, **settings), 49).eval()
    set_opening(layer, opening)
    index, x = layer.product_keys, tokens()
    weights, ids = layer.retrieve(x)
    opening = layer.product_keys.opening.item()
    new_halves = torch.tensor([(i >= 4) + (j >= 4) for i, j in expert_pairs(7, "shells")])

    def expected(dtype: torch.dtype) -> Tensor:
        scores = exhaustive_scores(index.query(x).to(dtype), index.compared(index.sub_keys).to(dtype), "shells")
        open_scores = scores + new_halves * math.log(opening)
        if dtype == torch.float64:
            assert torch.equal(ids, open_scores.topk(3).indices)
        if weighting == "softmax":  # the unweighted softmax, times the opening for each new half, scaled to sum 1
            halves = scores.gather(-1, ids).softmax(-1) * opening ** new_halves[ids].to(dtype)
            return halves / halves.sum(-1, keepdim=True)
        return WEIGHTINGS[weighting](open_scores.gather(-1, ids))

    assert_within_budget(weights, expected(torch.float32), expected(torch.float64))


def test_opening_is_continuous_at_both_ends() -> None:
    layer, x = grow(small_peer(), 49).eval(), tokens()
    layer.experts.fill(nn.init.normal_)
    closed = layer(x)
    assert torch.equal(set_opening(layer, 1e-30)(x), closed)
    half = set_opening(layer, 0.5)(x)
    nearly = set_opening(layer, 1 - 1e-7)(x)
    opened = set_opening(layer, 1)(x)
    assert_within_budget(nearly, opened, definition(layer)(x.double()))  # 1 - 1e-7 is a rounding below 1
    assert not torch.allclose(half, closed, atol=1e-2)
    assert not torch.allclose(half, opened, atol=1e-2)


def test_new_experts_learn_once_they_are_open() -> None:
    layer, x = grow(small_peer(), 49), tokens(200)
    layer(x).square().sum().backward()
    assert gradient_of(layer.experts)[16:].count_nonzero() == 0
    assert layer.product_keys.sub_keys.grad[:, :, 4:].count_nonzero() == 0
    layer.zero_grad()
    set_opening(layer, 0.5)(x).square().sum().backward()
    assert gradient_of(layer.experts)[16:, 1].count_nonzero() > 0
    assert layer.product_keys.sub_keys.grad[:, :, 4:].count_nonzero() > 0


def test_a_fully_open_layer_is_one_like_any_other() -> None:
    layer = set_opening(grow(small_peer(), 49), 1).eval()
    fresh = small_peer(num_experts=49).eval()
    assert layer.state_dict().keys() == fresh.state_dict().keys()
    fresh.load_state_dict(layer.state_dict())
    x = tokens()
    assert same_bits(fresh(x), layer(x))
    assert set_opening(layer, 1) is layer  # nothing left to do
    assert grow(layer, 100).product_keys.grown_from == 49


def test_a_partly_open_layer_is_saved_and_loaded() -> None:
    layer = set_opening(grow(small_peer(), 49), 0.25).eval()
    fresh = small_peer(num_experts=49, grown_from=16).eval()
    assert fresh.product_keys.opening.item() == 0
    fresh.load_state_dict(layer.state_dict())
    x = tokens()
    assert same_bits(fresh(x), layer(x))


@pytest.mark.filterwarnings("default")  # torch.compile warns of what it does
@pytest.mark.parametrize("opening", [0, 0.5])
def test_torch_compile_takes_a_partly_open_layer(opening: float) -> None:
    layer, x = set_opening(grow(small_peer(), 49), opening).eval(), tokens()
    compiled = torch.compile(layer, backend="eager")
    assert torch.equal(compiled(x), layer(x))
    set_opening(layer, 0.25)
    assert torch.equal(compiled(x), layer(x))


def test_autocast_and_half_precision_leave_a_partly_open_layer_its_experts() -> None:
    layer, x = set_opening(grow(small_peer(query_norm="none"), 49), 0.25).eval(), tokens()
    expected = layer.retrieve(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        query = layer.product_keys.query(x)
        found = layer.product_keys.search(query.float())
    same = layer.product_keys.search(query.float())
    assert torch.equal(found[1], same[1])
    assert expected[0].dtype == found[0].dtype == torch.float32
    assert layer.bfloat16()(x.bfloat16()).isfinite().all()


@pytest.mark.parametrize("shared_keys", [False, True])
def test_crowded_keys_start_near_those_used_most(shared_keys: bool) -> None:
    layer = small_peer(shared_keys=shared_keys)
    old = layer.product_keys.sub_keys.detach().clone()
    usage = torch.zeros(3, 16)
    pairs = expert_pairs(4, "shells")
    for head, (i, j) in enumerate([(2, 1), (2, 1), (0, 3)]):
        usage[head, pairs.index((i, j))] = 5
        usage[head, pairs.index((i, (j + 1) % 4))] = 2
    exact = grow(copy.deepcopy(layer), 36, keys="crowded", usage={"product_keys": usage}, noise=0)
    fresh = exact.product_keys.sub_keys[:, :, 4:]
    if shared_keys:  # heads 0 and 1 together use (2, 1) most, then (2, 2); head 2 uses (0, 3)
        assert torch.equal(fresh[0, 0], old[0, 0, [2, 0]])
        assert torch.equal(fresh[1, 0], old[1, 0, [1, 3]])
    else:
        for head, (i, j) in enumerate([(2, 1), (2, 1), (0, 3)]):
            assert torch.equal(fresh[0, head, 0], old[0, head, i])
            assert torch.equal(fresh[1, head], old[1, head, [j, (j + 1) % 4]])
    noisy = grow(copy.deepcopy(layer), 100**2, keys="crowded", usage={"product_keys": usage}, noise=0.5)
    exact = grow(copy.deepcopy(layer), 100**2, keys="crowded", usage={"product_keys": usage}, noise=0)
    ranked = exact.product_keys.sub_keys[:, :, 4:8]  # all of the old ones, the most used first, then again from there
    assert torch.equal(exact.product_keys.sub_keys[:, :, 8:12], ranked)
    assert len({tuple(key.tolist()) for key in ranked[0, 0]}) == 4
    difference = (noisy.product_keys.sub_keys - exact.product_keys.sub_keys)[:, :, 4:]
    spread = old.square().mean(dim=(-2, -1)).sqrt()
    torch.testing.assert_close(difference.std(dim=(-2, -1)), 0.5 * spread, rtol=0.2, atol=0)


@pytest.mark.parametrize("shared_keys", [False, True])
@pytest.mark.usefixtures("float64")
def test_keys_of_data_are_queries_as_loud_as_old_keys(shared_keys: bool) -> None:
    layer = small_peer(shared_keys=shared_keys)
    query = layer.product_keys.query(tokens(5)).detach()
    grown = grow(copy.deepcopy(layer), 100, keys="data", queries={"product_keys": query})
    fresh = grown.product_keys.sub_keys[:, :, 4:].detach()
    for half in range(2):
        halves = query[..., 3 * half : 3 * half + 3]
        for head in range(fresh.shape[1]):
            old = layer.product_keys.sub_keys[half, head].detach()
            near = (halves if shared_keys else halves[:, head]).reshape(-1, 3)
            likeness = nn.functional.cosine_similarity(fresh[half, head, :, None], near[None], dim=-1)
            torch.testing.assert_close(likeness.amax(dim=1), torch.ones(6))
            loudness = fresh[half, head].square().mean(dim=-1).sqrt()
            torch.testing.assert_close(loudness, old.square().mean().sqrt().expand(6))
    with pytest.raises(ValueError, match="queries has none of 'product_keys': collect them"):
        grow(layer, 100, keys="data")
    for wrong in (query[0], query[:0], query * torch.inf):
        with pytest.raises(ValueError, match=r"give finite ones of tokens, \(T, 3, 6\)"):
            grow(layer, 100, keys="data", queries={"product_keys": wrong})


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_memory_grows_as_a_layer_of_experts_does(backend: str) -> None:
    memory = ProductKeyMemory(
        DIM, num_values=16, heads=3, values_per_head=3, key_dim=6, pairing="shells", backend=backend
    )
    optimizer = RowAdamW(parameter_groups(memory), lr=0.01)
    train(memory, optimizer, [tokens(5)])
    before, values = copy.deepcopy(memory.eval()), memory.values.rows.detach().clone()
    x = tokens()
    grow(memory, 49, optimizer=optimizer)
    assert same_bits(memory(x), before(x))
    assert torch.equal(memory.values.rows[:16], values)
    assert memory.values.rows[16:].count_nonzero() == 0
    set_opening(memory, 0.5)
    train(memory.train(), optimizer, [tokens(40)])
    assert memory.eval().values.rows[16:].count_nonzero() > 0
    fresh = ProductKeyMemory(
        DIM, num_values=49, heads=3, values_per_head=3, key_dim=6, pairing="shells", backend=backend, grown_from=16
    )
    fresh.load_state_dict(memory.state_dict())
    assert same_bits(fresh.eval()(x), memory(x))


def test_usage_as_it_is_recorded_tells_where_keys_are_crowded() -> None:
    model = tiny_model()
    with record_usage(model) as usage:
        model(torch.randint(64, (2, 9)))
    counts = {name: each.retrievals_N for name, each in usage.items()}
    grow(model, 36, keys="crowded", usage=counts)
    assert model.config.peer["num_experts"] == 36


@pytest.mark.parametrize("row_format", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("shared_keys", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_renumbering_keeps_every_bit(backend: str, shared_keys: bool, row_format: str) -> None:
    layer = small_peer(pairing="row-major", backend=backend, shared_keys=shared_keys, row_format=row_format).eval()
    shells, x = to_shells(copy.deepcopy(layer)), tokens()
    assert same_bits(shells(x), layer(x))
    (weights, ids), (shells_weights, shells_ids) = layer.retrieve(x), shells.retrieve(x)
    assert same_bits(weights, shells_weights)
    row_major = torch.tensor([i * 4 + j for i, j in expert_pairs(4, "shells")])
    assert torch.equal(row_major[shells_ids], ids)
    assert same_bits(shells.experts.rows, layer.experts.rows[row_major])
    again = to_shells(copy.deepcopy(shells))
    assert same_bits(again.experts.rows, shells.experts.rows)


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AdamW": lambda model: torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=0.01, amsgrad=True),
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
    "RowAdamW": lambda model: RowAdamW(parameter_groups(model, weight_decay=0.1), lr=0.01),
    "fused": lambda model: RowAdamW(parameter_groups(model), lr=0.01, weight_decay=0.1, fused=True),
    "lazy": lambda model: RowAdamW(parameter_groups(model), lr=0.01, lazy=True),
    "row-wise": lambda model: RowAdamW(parameter_groups(model), lr=0.01, row_wise=True),
    "without momentum": lambda model: RowAdamW(parameter_groups(model), lr=0.01, betas=(0.0, 0.999)),
}


def train(layer: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Tensor]) -> None:
    for x in batches:
        optimizer.zero_grad()
        (layer(x) - x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_optimizer_goes_on_with_its_state(kind: str, trained: bool) -> None:
    layer = small_peer()
    optimizer = OPTIMIZERS[kind](layer)
    if trained:
        train(layer, optimizer, [tokens(2) for _ in range(4)])
    layer.eval()
    olds = [*layer.experts.row_parameters(), layer.product_keys.sub_keys]
    shapes = {"experts.rows": (16, 2, DIM), "product_keys.sub_keys": layer.product_keys.sub_keys.shape}

    def states() -> dict[str, dict[str, Any]]:
        of_keys = optimizer.state.get(layer.product_keys.sub_keys, {})
        return {"experts.rows": state_of(optimizer, layer.experts), "product_keys.sub_keys": of_keys}

    before = copy.deepcopy(states())
    grow(layer, 49, optimizer=optimizer)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in layer.parameters()}
    for old in olds:
        assert old not in optimizer.state
        assert old.numel() == 0  # who still held it notices
    for name, after in states().items():
        new = layer.state_dict()[name]
        assert after.keys() == before[name].keys()
        assert bool(after) == trained
        for key, value in before[name].items():
            if not isinstance(value, Tensor) or tuple(value.shape) not in (
                tuple(shapes[name]),
                tuple(shapes[name][:1]),
            ):
                same = torch.equal(after[key], value) if isinstance(value, Tensor) else after[key] == value
                assert same, key
                continue
            assert after[key].shape == new.shape[: value.ndim]
            kept = tuple(slice(size) for size in value.shape)
            assert torch.equal(after[key][kept], value)
            added = torch.ones(after[key].shape, dtype=torch.bool)
            added[kept] = False
            assert torch.equal(after[key][added].unique(), torch.tensor([4 * (key == "weights_step")]).to(value))
    layer.train()
    train(set_opening(layer, 0.5), optimizer, [tokens(40) for _ in range(3)])
    layer.eval()
    assert layer.experts.rows[16:, 1].count_nonzero() > 0


@pytest.mark.parametrize("fused", [False, True])
def test_rows_that_grow_are_those_of_dense_adamw(fused: bool) -> None:
    torch.manual_seed(3)
    dense = small_peer(backend="reference").double()
    rows = copy.deepcopy(dense)
    optimizers = [
        torch.optim.AdamW(dense.parameters(), lr=0.01, weight_decay=0.1),
        RowAdamW(
            [
                {"params": rows.experts.row_parameters(), "rows": True},
                {"params": [p for name, p in rows.named_parameters() if not name.startswith("experts")]},
            ],
            lr=0.01,
            weight_decay=0.1,
            fused=fused,
        ),
    ]
    before = dense.experts.rows.detach().clone()
    for size, opening in ((16, 1), (49, 0.3), (49, 1), (144, 0.6)):
        batches = [tokens(2).double() for _ in range(12)]
        for layer, optimizer in zip((dense, rows), optimizers, strict=True):
            if size > layer.experts.num_experts:
                grow(layer, size, optimizer=optimizer)
            set_opening(layer, opening)
            train(layer, optimizer, batches)
    rows.eval()
    moved = (dense.experts.rows[:16] - before).norm()
    assert (rows.experts.rows - dense.experts.rows).norm() <= 1e-9 * moved
    torch.testing.assert_close(rows.product_keys.sub_keys, dense.product_keys.sub_keys, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_optimizer_goes_on_after_renumbering(kind: str) -> None:
    torch.manual_seed(0)
    layer = small_peer(pairing="row-major", backend="reference").double()
    twin = copy.deepcopy(layer)
    first, second = [tokens(3).double() for _ in range(4)], [tokens(3).double() for _ in range(4)]
    for each, renumber in ((layer, False), (twin, True)):
        optimizer = OPTIMIZERS[kind](each)
        train(each, optimizer, first)
        if renumber:
            to_shells(each, optimizer=optimizer)
        train(each, optimizer, second)
        each.eval()
    order = torch.tensor([i * 4 + j for i, j in expert_pairs(4, "shells")])
    torch.testing.assert_close(twin.experts.rows, layer.experts.rows[order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("change", ["grow", "to_shells"])
def test_without_the_optimizer_rows_left_behind_are_brought_up_to_date(change: str) -> None:
    layer = small_peer(pairing="shells" if change == "grow" else "row-major")
    batches = [tokens(1) for _ in range(5)]
    twin = copy.deepcopy(layer)
    for each in (layer, twin):
        train(each, OPTIMIZERS["RowAdamW"](each), batches)
    with rows_as_they_are():
        left_behind = layer.experts.rows.detach().clone()
    changed = grow(layer, 49) if change == "grow" else to_shells(layer)
    up_to_date = twin.eval().experts.rows
    if change == "to_shells":
        up_to_date = up_to_date[[i * 4 + j for i, j in expert_pairs(4, "shells")]]
    assert torch.equal(changed.experts.rows[:16], up_to_date)
    assert not torch.equal(left_behind, twin.experts.rows)


def test_an_optimizer_within_a_step_is_refused() -> None:
    layer = small_peer()
    optimizer = OPTIMIZERS["fused"](layer)
    layer(tokens()).square().sum().backward()
    with pytest.raises(ValueError, match=r"the step is open: call optimizer.step\(\) first"):
        grow(layer, 49, optimizer=optimizer)
    assert layer.experts.num_experts == 16
    assert layer.product_keys.sub_keys.shape[2] == 4


def test_a_parameter_that_the_optimizer_does_not_train_is_not_replaced() -> None:
    parameter = nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2, 3))], lr=0.1)
    with pytest.raises(
        ValueError, match=r"the optimizer does not train this parameter \(2, 3\); pass the one that does"
    ):
        replace_parameters(optimizer, [parameter], [nn.Parameter(torch.ones(3, 3))], lambda old, value: old)


def tiny_model(**peer: Any) -> PeerForCausalLM:
    experts = {"num_experts": 16, "heads": 2, "experts_per_head": 3, "key_dim": 8, "pairing": "shells"} | peer
    config = PeerConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        ffw_layers=["peer", "peer"],
        peer=experts,
    )
    return PeerForCausalLM(config).eval()


@pytest.mark.parametrize("opening", [0, 0.3, 1])
@pytest.mark.parametrize("row_format", ["float32", "bfloat16", "int8"])
def test_a_grown_model_is_saved_and_loaded(tmp_path: Path, row_format: str, opening: float) -> None:
    model, ids = tiny_model(row_format=row_format), torch.randint(64, (2, 9))
    before = model(ids).logits
    grow(model, 49)
    assert same_bits(model(ids).logits, before)
    set_opening(model, opening)
    logits = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded, report = PeerForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert same_bits(loaded.eval()(ids).logits, logits)
    assert loaded.config.peer["num_experts"] == 49
    assert loaded.config.peer.get("grown_from") == (None if opening == 1 else 16)
    set_opening(loaded, 1)
    assert "grown_from" not in loaded.config.peer
    grow(loaded, 64)


def test_a_renumbered_model_is_saved_and_loaded(tmp_path: Path) -> None:
    model, ids = tiny_model(pairing="row-major"), torch.randint(64, (2, 9))
    before = model(ids).logits
    to_shells(model).save_pretrained(tmp_path)
    loaded = PeerForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.peer["pairing"] == "shells"
    assert same_bits(loaded(ids).logits, before)


@pytest.mark.parametrize("mode", ["beside", "replace"])
def test_a_converted_model_grows(new_model: Callable[..., Any], mode: str, tmp_path: Path) -> None:
    model = new_model("llama").eval()
    ids = torch.randint(64, (2, 9))
    convert(model, mode=mode, num_experts=16, heads=2, experts_per_head=3, key_dim=8)
    before = model(ids).logits
    grow(to_shells(model), 49).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert same_bits(loaded(ids).logits, before)
    assert {module.experts.num_experts for module in loaded.modules() if isinstance(module, PEER)} == {49}


STEPS = st.lists(st.sampled_from(["grow", "open", "train", "save", "renumber"]), min_size=2, max_size=8)


@given(
    STEPS,
    st.sampled_from(BACKENDS),
    st.booleans(),
    st.sampled_from(["float32", "bfloat16"]),
    st.sampled_from(["random", "crowded"]),
)
@settings(max_examples=25)
def test_any_sequence_of_steps_keeps_what_it_must(
    steps: list[str], backend: str, shared_keys: bool, row_format: str, keys: str
) -> None:
    torch.manual_seed(0)
    layer = small_peer(pairing="row-major", backend=backend, shared_keys=shared_keys, row_format=row_format)
    to_shells(layer)
    optimizer = RowAdamW(parameter_groups(layer), lr=0.05, lazy=row_format == "bfloat16")
    x, opening = tokens(6), 1.0
    for step in steps:
        before = layer.eval()(x)
        n = layer.product_keys.sub_keys.shape[2]
        if step == "grow":
            usage = {"product_keys": torch.arange(n * n)}
            set_opening(layer, 1)
            before, opening = layer(x), 0.0
            grow(layer, (n + 2) ** 2, keys=keys, usage=usage, optimizer=optimizer)
        elif step == "open" and opening < 1:
            opening = 0.5 if opening == 0 else 1.0
            set_opening(layer, opening)
            before = layer(x)
        elif step == "train":
            train(layer.train(), optimizer, [tokens(3), tokens(3)])
            before = layer.eval()(x)
        elif step == "save":
            loaded = small_peer(
                num_experts=n * n,
                backend=backend,
                shared_keys=shared_keys,
                row_format=row_format,
                grown_from=layer.product_keys.grown_from,
            )
            loaded.load_state_dict(layer.state_dict())
            saved = optimizer.state_dict()
            optimizer = RowAdamW(parameter_groups(loaded), lr=0.05, lazy=row_format == "bfloat16")
            optimizer.load_state_dict(saved)
            layer = loaded.eval()
        elif step == "renumber":
            to_shells(layer, optimizer=optimizer)
        assert same_bits(layer.eval()(x), before)


def test_a_model_without_such_layers_is_refused() -> None:
    for change in (lambda: grow(nn.Linear(2, 2), 49), lambda: set_opening(nn.Linear(2, 2), 1)):
        with pytest.raises(ValueError, match="Linear has no PEER layer"):
            change()


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        (
            {"pairing": "row-major"},
            {},
            r"the layer has pairing 'row-major', .* call peerlm.growth.to_shells\(model\) first, or build it with",
        ),
        (
            {"num_experts": 49, "grown_from": 16},
            {"num_experts": 64},
            r"the layer grew from 16 experts and is open at 0: set_opening\(model, 1\) before it grows again",
        ),
        ({}, {"num_experts": 16}, "num_experts is 16, but the layer has 16; give a larger square"),
        ({}, {"num_experts": 48}, "num_experts is 48, which is not a square number; .* the nearest is 49"),
        ({}, {"keys": "near"}, "keys is 'near'; choose one of random, crowded"),
        ({}, {"noise": -0.5}, "noise is -0.5; take a number of at least 0"),
        ({}, {"noise": math.nan}, "noise is nan; take a number of at least 0"),
        ({}, {"keys": "crowded"}, "keys is 'crowded', but usage has no counts of 'product_keys': measure them"),
        (
            {},
            {"keys": "crowded", "usage": {"product_keys": torch.ones(15)}},
            r"usage of 'product_keys' has shape \(15,\); .* \(16,\), or for each head and expert, \(3, 16\)",
        ),
        (
            {},
            {"keys": "crowded", "usage": {"product_keys": torch.zeros(16)}},
            "usage of 'product_keys' must be numbers of at least 0, not all of them 0",
        ),
        (
            {},
            {"keys": "crowded", "usage": {"product_keys": torch.arange(16) - 1}},
            "usage of 'product_keys' must be numbers of at least 0",
        ),
        (
            {},
            {"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))])},
            "the optimizer does not train this model; pass the one that does, or none",
        ),
    ],
    ids=str,
)
def test_growth_that_is_impossible_changes_nothing(
    settings: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    layer = small_peer(**settings)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        grow(layer, **({"num_experts": 49} | arguments))
    assert before.keys() == layer.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("part", ["experts", "experts.rows", "product_keys", "product_keys.sub_keys"])
@pytest.mark.parametrize("change", [grow, shrink, to_shells])
def test_what_layers_share_is_not_taken_from_one_of_them(change: Callable[..., Any], part: str) -> None:
    pairing = "row-major" if change is to_shells else "shells"
    model = nn.Sequential(small_peer(pairing=pairing), small_peer(pairing=pairing))
    path, _, name = part.rpartition(".")
    source, target = model[0].get_submodule(path), model[1].get_submodule(path)
    for each in source.parameter_roles if name == "rows" else (name,):
        setattr(target, each, getattr(source, each))
    x = tokens()
    before = model.eval()(x)
    options: dict[Any, dict[str, Any]] = {
        grow: {"num_experts": 49},
        shrink: {"num_experts": 9, "usage": {f"{i}.product_keys": torch.arange(16) + 1 for i in range(2)}},
        to_shells: {},
    }
    what = "rows" if "experts" in part else "sub-keys"
    with pytest.raises(ValueError, match=f"layer '0' shares its {what} with another part of the model.* of its own"):
        change(model, **options[change])
    assert same_bits(model(x), before)


def test_a_layer_that_occurs_twice_grows_once() -> None:
    layer = small_peer()
    model, x = nn.Sequential(layer, layer), tokens()
    before = model.eval()(x)
    assert same_bits(grow(model, 49)(x), before)


def test_the_old_state_of_an_optimizer_is_seen_to_be_gone() -> None:
    layer = small_peer()
    optimizer = torch.optim.Adam(layer.parameters())
    train(layer, optimizer, [tokens()])
    # As `optimizer.state_dict()` has it.
    held = [optimizer.state[parameter]["exp_avg"] for parameter in layer.experts.row_parameters()]
    grow(layer, 49, optimizer=optimizer)
    assert all(moments.numel() == 0 for moments in held)


def test_experts_and_memories_that_grow_together_remember_what_each_had(tmp_path: Path) -> None:
    sizes = {"heads": 2, "key_dim": 8, "pairing": "shells"}
    config = PeerConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffw_layers=["peer", "pkm"],
        peer={"num_experts": 16, "experts_per_head": 3, **sizes},
        pkm={"num_values": 36, "values_per_head": 3, **sizes},
    )
    model, ids = PeerForCausalLM(config).eval(), torch.randint(64, (2, 9))
    set_opening(grow(model, 49), 0.3)
    assert (model.config.peer["grown_from"], model.config.pkm["grown_from"]) == (16, 36)
    model.save_pretrained(tmp_path)
    assert same_bits(PeerForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, model(ids).logits)


def test_the_message_names_the_layer_of_a_model() -> None:
    with pytest.raises(ValueError, match=r"layer 'model.layers.0.ffw' has pairing 'row-major'"):
        grow(tiny_model(pairing="row-major"), 49)


@pytest.mark.parametrize("opening", [-0.1, 1.1, math.nan])
def test_openings_that_do_not_exist(opening: float) -> None:
    with pytest.raises(ValueError, match=r"opening is .*; take a number from 0, closed, to 1, fully open"):
        set_opening(grow(small_peer(), 49), opening)


def test_nothing_to_open() -> None:
    with pytest.raises(ValueError, match=r"opening is 0.5, but every layer is fully open: grow\(model, num_experts\)"):
        set_opening(small_peer(), 0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grown_from": 15}, "grown_from is 15, which is not a square number"),
        ({"grown_from": 4}, "experts_per_head is 3, more than the 2 sub-keys per half of grown_from = 4"),
        ({"grown_from": 16}, "grown_from is 16, but there are 16 experts; a layer grows to more than it had"),
        (
            {"grown_from": 9, "pairing": "row-major"},
            "pairing is 'row-major', in which growth would move experts; take pairing='shells'",
        ),
    ],
    ids=str,
)
def test_layers_that_cannot_have_grown(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_peer(**settings)


def test_layers_of_different_sizes_do_not_grow_to_what_no_configuration_says() -> None:
    peer = {"num_experts": 64, "heads": 1, "experts_per_head": 2, "key_dim": 4, "pairing": "shells"}
    sizes = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = PeerForCausalLM(PeerConfig(**sizes, ffw_layers=["peer", "dense"], peer=peer))
    convert(model, mode="replace", layers=[0], **{**peer, "num_experts": 49})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"has 64 experts and .* 49; a saved model says one number"):
        grow(model, 100)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
