"""Packs come and go: bits of the model without them, what is frozen, who may load them, what they cost."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from peerlm.accounting import model_cost
from peerlm.convert import convert
from peerlm.growth import grow, observe, set_opening, shrink
from peerlm.layers import PEER, ProductKeys
from peerlm.model import PeerConfig, PeerForCausalLM
from peerlm.ops.cpu import native
from peerlm.ops.row_updates import rows_as_they_are
from peerlm.optim import RowAdamW, parameter_groups
from peerlm.optim.catch_up import TOLERANCE
from peerlm.packs.api import choose_packs, load_pack, loaded_packs, new_pack, pack_parameters, save_pack, unload_pack
from peerlm.packs.base_hash import base_hash
from peerlm.testing import assert_within_budget, definition, float64, relative_error
from peerlm.usage import record_usage

BACKENDS = ["reference", "bag", *([] if native._reason else ["cpu"])]
LAYERS = ["model.layers.0.ffw", "model.layers.2.ffw"]
IDS = torch.arange(27).view(3, 9)


def small_model(**peer: Any) -> PeerForCausalLM:
    experts = {"num_experts": 16, "heads": 2, "experts_per_head": 3, "key_dim": 8, "pairing": "shells"} | peer
    torch.manual_seed(0)
    config = PeerConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=32,
        ffw_layers=["peer", "dense", "peer"],
        peer=experts,
    )
    return PeerForCausalLM(config).eval()


def add_pack(model: nn.Module, name: str, size: int = 9, **options: Any) -> None:
    """A pack that does something."""
    new_pack(model, name, size, seed=len(name), **options)
    generator = torch.Generator().manual_seed(len(name))
    for parameter in pack_parameters(model, name):
        nn.init.normal_(parameter, generator=generator)


def logits(model: nn.Module, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, **options).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("row_format", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_unloading_gives_back_every_bit(backend: str, row_format: str, tmp_path: Path) -> None:
    if backend == "bag" and row_format == "int8":
        pytest.skip("bag takes no int8 rows")
    model = small_model(backend=backend, row_format=row_format)
    before, weights = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    for name in ("law", "medicine"):
        add_pack(model, name)
        save_pack(model, name, tmp_path / name)
    with_both = logits(model)
    with float64():
        exact = logits(definition(model))
    assert not torch.allclose(with_both, before, atol=1e-2)
    unload_pack(model, "law")
    only_one = logits(model)
    unload_pack(model, "medicine")
    assert torch.equal(logits(model), before)
    assert all(module.packs is None for module in model.modules() if isinstance(module, PEER))
    assert load_pack(model, tmp_path / "medicine") == "medicine"
    assert torch.equal(logits(model), only_one)
    assert load_pack(model, tmp_path / "law", "statutes") == "statutes"
    assert loaded_packs(model) == ["medicine", "statutes"]
    assert_within_budget(logits(model), with_both, exact)  # another name, another order of sums
    unload_pack(model, "statutes")
    assert torch.equal(logits(model), only_one)
    load_pack(model, tmp_path / "law")
    assert torch.equal(logits(model), with_both)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["grow", "shrink", "open", "new", "load", "unload", "save", "round trip"]),
        st.sampled_from("abc"),
    ),
    min_size=3,
    max_size=10,
)


@given(STEPS, st.sampled_from(BACKENDS), st.sampled_from(["float32", "bfloat16", "int8"]))
@settings(max_examples=25)
def test_any_sequence_of_steps_keeps_what_it_must(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str]], backend: str, row_format: str
) -> None:
    folder = tmp_path_factory.mktemp("packs")
    model = small_model(backend="reference" if backend == "bag" else backend, row_format=row_format)
    saved: dict[str, tuple[str, list[Tensor]]] = {}
    for step, name in steps:
        before, names, plain = logits(model), loaded_packs(model), base_only(model)
        if step == "grow":
            set_opening(model, 1)
            before, plain = logits(model), base_only(model)
            grow(model, (math.isqrt(experts(model)) + 1) ** 2)
        elif step == "shrink" and experts(model) > 9:
            set_opening(model, 1)
            usage = torch.arange(float(experts(model)))
            shrink(model, (math.isqrt(experts(model)) - 1) ** 2, usage=dict.fromkeys(indices(model), usage))
            before, plain = logits(model), base_only(model)
        elif step == "open":
            set_opening(model, 1)
            before, plain = logits(model), base_only(model)
        elif step == "new" and name not in names:
            add_pack(model, name)
            before = logits(model)
        elif step == "unload" and name in names:
            unload_pack(model, name)
            before = logits(model)
        elif step == "save" and name in names:
            save_pack(model, name, folder / name)
            saved[name] = base_hash(model), [part.detach().clone() for part in pack_parameters(model, name)]
        elif step == "load" and name in saved and name not in names:
            if saved[name][0] == base_hash(model):
                load_pack(model, folder / name)
                assert all(map(torch.equal, pack_parameters(model, name), saved[name][1]))
                before = logits(model)
            else:
                with pytest.raises(ValueError, match="was made for the model"):
                    load_pack(model, folder / name)
        elif step == "round trip":
            for each in names:
                save_pack(model, each, folder / f"all-{each}")
            model.save_pretrained(folder / "model")
            model = PeerForCausalLM.from_pretrained(folder / "model").eval()
            assert torch.equal(logits(model), plain)
            for each in reversed(names):
                load_pack(model, folder / f"all-{each}")
        assert torch.equal(logits(model), before)
        assert torch.equal(base_only(model), plain)


def experts(model: nn.Module) -> int:
    return next(module.experts.num_experts for module in model.modules() if isinstance(module, PEER))


def indices(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, ProductKeys)]


def base_only(model: nn.Module) -> Tensor:
    with choose_packs(model, [[]]):
        return logits(model)


def test_a_saved_model_has_no_packs_and_its_hash_does_not_depend_on_them(tmp_path: Path) -> None:
    model = small_model()
    before, keys = base_hash(model), model.state_dict().keys()
    plain = logits(model)
    add_pack(model, "law")
    assert base_hash(model) == before
    assert model.state_dict().keys() == keys
    model.load_state_dict(model.state_dict())
    model.save_pretrained(tmp_path)
    loaded, report = PeerForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(logits(loaded.eval()), plain)
    assert base_hash(loaded) == before
    assert base_hash(copy.deepcopy(model)) == before
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def test_the_hash_is_of_weights_settings_and_formats() -> None:
    model = small_model()
    hashes = {base_hash(model), base_hash(model)}
    assert len(hashes) == 1
    with torch.no_grad():
        model.model.norm.weight[3] += 1
    hashes.add(base_hash(model))
    model.model.layers[0].ffw.product_keys.query_norm.running_var.mul_(2)
    hashes.add(base_hash(model))
    model.model.layers[0].ffw.weight_scale = 2.0
    hashes.add(base_hash(model))
    model.model.layers[0].ffw.product_keys.key_norm = True
    hashes.add(base_hash(model))
    model.model.layers[0].ffw.experts.convert_rows("int8")
    hashes.add(base_hash(model))
    hashes.add(base_hash(model.bfloat16()))
    hashes.add(base_hash(grow(model, 25)))
    assert len(hashes) == 8


def test_rows_that_an_optimizer_changes_behind_autograd_are_hashed_again() -> None:
    layer = PEER(8, num_experts=16, heads=2, experts_per_head=2, key_dim=4, query_norm="none").requires_grad_(False)
    layer.experts.requires_grad_(True)
    optimizer = RowAdamW(parameter_groups(layer), lr=0.1, fused=True)
    hashes = {base_hash(layer)}
    for _ in range(3):
        layer(torch.randn(9, 8)).square().sum().backward()
        optimizer.step()
        hashes.add(base_hash(layer))
    assert len(hashes) == 4


@pytest.mark.parametrize("row_format", ["float32", "bfloat16"])
def test_training_a_pack_leaves_the_rest_as_it_is(row_format: str, tmp_path: Path) -> None:
    model = small_model(query_norm="batch")
    before, plain = base_hash(model), logits(model)
    model.requires_grad_(False)
    assert new_pack(model, "law", 25, row_format=row_format) == LAYERS
    groups = parameter_groups(model)
    assert {group["name"]: len(group["params"]) for group in groups} == {"table": 2 * row_parameters(model), "keys": 2}
    assert {p for group in groups for p in group["params"]} == set(pack_parameters(model, "law"))
    optimizer = RowAdamW(groups, lr=0.03, lazy=row_format == "bfloat16")
    labels, losses = IDS.flip(-1), []
    for _ in range(30):
        model.train()
        loss = model(IDS, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    manifest = save_pack(model, "law", tmp_path / "law")
    model.eval()
    trained = logits(model)
    assert (manifest.base, manifest.dtype) == (before, row_format)
    unload_pack(model, "law")
    assert torch.equal(logits(model), plain)
    assert base_hash(model) == before
    load_pack(model, tmp_path / "law")
    assert torch.equal(logits(model), trained)
    assert not any(parameter.requires_grad for parameter in pack_parameters(model, "law"))


@pytest.mark.usefixtures("float64")
def test_rows_left_behind_are_brought_up_to_date_when_they_are_read(tmp_path: Path) -> None:
    layer = PEER(8, num_experts=16, heads=2, experts_per_head=2, key_dim=4, query_norm="none").requires_grad_(False)
    new_pack(layer, "law", 25)
    twin = copy.deepcopy(layer)
    batches = [torch.randn(2, 8) for _ in range(12)]
    for each, optimizer in ((layer, RowAdamW), (twin, torch.optim.AdamW)):
        stepping = optimizer(parameter_groups(each), lr=0.03)
        for x in batches:
            (each(x) - 1).square().sum().backward()
            stepping.step()
            stepping.zero_grad()
    with rows_as_they_are():
        behind = layer.packs.by_name()["law"].table.rows.detach().clone()
    save_pack(layer, "law", tmp_path)
    saved, pack = load_file(next(tmp_path.glob("*.safetensors"))), twin.packs.by_name()["law"]
    assert relative_error(saved["rows"], pack.table.rows.detach()) < TOLERANCE
    assert relative_error(saved["sub_keys"], pack.sub_keys.detach()) < TOLERANCE
    assert relative_error(behind, pack.table.rows.detach()) > 100 * TOLERANCE


def test_packs_that_are_trained_beside_others_get_gradients_and_others_stay(request: pytest.FixtureRequest) -> None:
    model = small_model()
    model.requires_grad_(False)
    for name in ("a", "bb", "ccc"):
        add_pack(model, name, 16)
    for name in ("a", "ccc"):
        for parameter in pack_parameters(model, name):
            parameter.requires_grad_(False)
    logits(model)  # their rows become views of one table
    fixed = [p.clone() for name in ("a", "ccc") for p in pack_parameters(model, name)]
    trained = pack_parameters(model, "bb")
    before = [p.clone() for p in trained]
    optimizer = RowAdamW(parameter_groups(model), lr=0.1)
    model.train()(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert not any(map(torch.equal, trained, before))
    assert all(map(torch.equal, [p for name in ("a", "ccc") for p in pack_parameters(model, name)], fixed))
    trained_logits = logits(model.eval())
    twin = copy.deepcopy(model)
    if request.config.getoption("--tables") == "mapped":  # the copy is in memory, where packs become one table
        torch.testing.assert_close(logits(twin), trained_logits)
    else:
        assert torch.equal(logits(twin), trained_logits)
    with torch.no_grad():
        pack_parameters(twin, "a")[1].mul_(2)
    assert not torch.equal(logits(twin), trained_logits)
    with float64():
        exact = logits(definition(model))
    assert not torch.equal(logits(model.double()).float(), trained_logits)
    assert_within_budget(logits(model.float()), trained_logits, exact)


def test_a_pack_of_chosen_layers(tmp_path: Path) -> None:
    model = small_model()
    assert new_pack(model, "law", 4, layers=LAYERS[1:]) == LAYERS[1:]
    add_pack(model, "other")
    assert len(pack_parameters(model, "law")) == 1 + row_parameters(model)
    assert save_pack(model, "law", tmp_path / "law").layers == {LAYERS[1]: 4}
    unload_pack(model, "law")
    load_pack(model, tmp_path / "law")
    assert [layer.packs.by_name().keys() for layer in peer_layers(model)] == [{"other"}, {"law", "other"}]


def peer_layers(model: nn.Module) -> list[PEER]:
    return [module for module in model.modules() if isinstance(module, PEER)]


def row_parameters(model: nn.Module) -> int:
    """Of each table."""
    return len(peer_layers(model)[0].experts.parts())


def test_what_a_new_pack_starts_as() -> None:
    model = small_model(gated=True)
    state = torch.random.get_rng_state()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        new_pack(model, name, 400, seed=seed)
    assert torch.equal(torch.random.get_rng_state(), state)
    (keys, rows, *_), same, other = (pack_parameters(model, name) for name in "abc")
    assert torch.equal(keys, same[0])
    assert torch.equal(rows, same[1])
    assert not torch.equal(keys, other[0])
    assert not torch.equal(rows, other[1])
    assert rows[:, 1].count_nonzero() == 0
    for vector in (0, 2):
        assert rows[:, vector].std().item() == pytest.approx(16**-0.5, rel=0.05)
    assert keys.abs().max() <= 0.5
    usage = {f"{path}.product_keys": torch.arange(16) for path in LAYERS}
    new_pack(model, "near", 4, keys="crowded", usage=usage, noise=0.0)
    own = peer_layers(model)[0].product_keys.sub_keys
    near = pack_parameters(model, "near")[0]
    assert all((own == near[:, :, i : i + 1]).all(dim=-1).any(dim=2).all() for i in range(2))


@pytest.mark.parametrize("mode", ["beside", "replace"])
def test_converted_models_take_packs(new_model: Callable[..., Any], mode: str, tmp_path: Path) -> None:
    model = new_model("llama").eval()
    convert(model, mode=mode, num_experts=16, heads=2, experts_per_head=3, key_dim=8)
    before = logits(model)
    add_pack(model, "law")
    with_pack = logits(model)
    assert not torch.equal(with_pack, before)
    save_pack(model, "law", tmp_path / "law")
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model").eval()
    assert torch.equal(logits(loaded), before)
    load_pack(loaded, tmp_path / "law")
    assert torch.equal(logits(loaded), with_pack)
    with choose_packs(loaded, [["law"], [], ["law"]]):
        assert torch.equal(logits(loaded)[1], before[1])


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 3}], ids=str)
def test_generation_follows_the_choice(options: dict[str, Any]) -> None:
    model = small_model()
    prompts = IDS[:2, :4]

    def generate(which: Tensor) -> Tensor:
        torch.manual_seed(0)
        settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | options
        return model.generate(which, **settings)  # type: ignore[operator, no-any-return]

    plain = generate(prompts)
    add_pack(model, "law", 25)
    packed = generate(prompts)
    half = len(packed) // 2
    with choose_packs(model, [["law"], []]):
        mixed = generate(prompts)
    assert not torch.equal(packed[half:], plain[half:])
    assert torch.equal(mixed[:half], packed[:half])
    if not options.get("do_sample"):  # samples share one stream of random numbers, but beams and greedy choices none
        assert torch.equal(mixed[half:], plain[half:])


def test_choices_nest_and_padding_stays_out_of_usage() -> None:
    model = small_model()
    plain = logits(model)
    add_pack(model, "law")
    everything = logits(model)
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    with choose_packs(model, [["law"]] * 3), record_usage(model) as usage:
        with choose_packs(model, [[]]):
            assert torch.equal(logits(model), plain)
        usage.clear()
        assert torch.equal(logits(model, attention_mask=mask)[1:], everything[1:])
    assert {name: counts.num_experts for name, counts in usage.items()} == {f"{path}.packs": 25 for path in LAYERS}
    for counts in usage.values():
        assert counts.retrievals_N.sum() == (27 - 4) * 2 * 3
        assert counts.retrievals_N[16:].sum() > 0
        rounding = 3 * torch.finfo(torch.float32).eps  # of three weights, which sum to 1
        assert counts.weight_N.sum().item() == pytest.approx((27 - 4) * 2, rel=rounding)


def test_what_packs_cost() -> None:
    model = small_model()
    before = model_cost(model, 32)
    add_pack(model, "law", 25)
    add_pack(model, "code", 4)
    after = model_cost(model, 32)
    sub_keys = 2 * (2 * (5 + 2) * 4)  # layers, and in each: halves, sub-keys, features
    assert after.total_parameters - before.total_parameters == sub_keys + 2 * (25 + 4) * 2 * 16
    assert after.active_parameters - before.active_parameters == sub_keys
    assert after.forward_flops_per_token - before.forward_flops_per_token == 2 * sub_keys * 2


def test_packs_of_different_row_formats_together(tmp_path: Path) -> None:
    model = small_model()
    for name, row_format in (("a", "float32"), ("bb", "bfloat16"), ("ccc", "float32"), ("dddd", "float32")):
        add_pack(model, name, row_format=row_format)
    together = logits(model)
    for name in "a", "bb":
        save_pack(model, name, tmp_path / name)
        unload_pack(model, name)
    rest = logits(model)
    for name in "bb", "a":
        load_pack(model, tmp_path / name)
    assert torch.equal(logits(model), together)
    assert not torch.equal(rest, together)
    assert pack_parameters(model, "bb")[1].dtype == torch.bfloat16


def refuse_unknown(model: nn.Module) -> list[Callable[[], object]]:
    return [
        lambda: pack_parameters(model, "law"),
        lambda: unload_pack(model, "law"),
        lambda: save_pack(model, "law", "folder"),
        lambda: choose_packs(model, [["law"]]).__enter__(),
    ]


def test_a_pack_that_is_not_loaded() -> None:
    model = small_model()
    for call in refuse_unknown(model):
        with pytest.raises(ValueError, match="no pack 'law' is loaded; there is none"):
            call()
    add_pack(model, "code")
    for call in refuse_unknown(model):
        with pytest.raises(ValueError, match="no pack 'law' is loaded; there is code"):
            call()
    assert loaded_packs(model) == ["code"]


@pytest.mark.parametrize(
    ("name", "size", "options", "message"),
    [
        ("law", 9, {}, "a pack 'law' is loaded already; unload it first, or take another name"),
        ("a.b", 9, {}, "a pack cannot be called 'a.b'; take up to 64 letters"),
        ("", 9, {}, "a pack cannot be called ''"),
        ("-x", 9, {}, "a pack cannot be called '-x'"),
        ("new", 10, {}, "num_experts is 10, which is not a square number.* the nearest is 9"),
        ("new", 0, {}, "num_experts is 0; it must be at least 1"),
        (
            "new",
            9,
            {"layers": ["model.layers.1.ffw"]},
            "layers has 'model.layers.1.ffw', but the PEER layers are 'model",
        ),
        ("new", 9, {"layers": []}, r"layers is \[\]; give a list of paths of PEER layers, or None for all"),
        ("new", 9, {"layers": LAYERS[0]}, "layers is 'model.layers.0.ffw'; give a list of paths"),
        (
            "new",
            9,
            {"row_format": "int8"},
            "row_format is 'int8'; a pack is trained, so choose one of float32, bfloat16",
        ),
        ("new", 9, {"keys": "near"}, "keys is 'near'; choose one of random, crowded"),
        (
            "new",
            9,
            {"keys": "crowded"},
            "keys is 'crowded', but usage has no counts of 'model.layers.0.ffw.product_keys'",
        ),
    ],
    ids=str,
)
def test_packs_that_cannot_be_made_change_nothing(name: str, size: int, options: dict[str, Any], message: str) -> None:
    model = small_model()
    add_pack(model, "law")
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        new_pack(model, name, size, **options)
    assert loaded_packs(model) == ["law"]
    assert torch.equal(logits(model), before)


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no PEER layer and is no model of transformers"):
        new_pack(nn.Linear(2, 2), "law", 9)


@pytest.mark.parametrize("names", [[], "law", ["law"]], ids=str)
def test_choices_that_are_none(names: Any) -> None:
    model = small_model()
    add_pack(model, "law")
    with (
        pytest.raises(ValueError, match="give a list of names for each sequence of the batch"),
        choose_packs(model, names),
    ):
        pass


def test_a_choice_for_another_batch() -> None:
    model = small_model()
    add_pack(model, "law")
    with (
        choose_packs(model, [["law"], []]),
        pytest.raises(ValueError, match="choose_packs has 2 lists, but the batch has 3 sequences; give one for each"),
    ):
        logits(model)
    assert torch.isfinite(logits(model)).all()


def test_a_chosen_pack_is_not_unloaded() -> None:
    model = small_model()
    add_pack(model, "law")
    with (
        choose_packs(model, [["law"]]),
        pytest.raises(ValueError, match="choose_packs names the pack 'law' now; unload"),
    ):
        unload_pack(model, "law")
    unload_pack(model, "law")


def test_a_pack_of_one_layer_alone(tmp_path: Path) -> None:
    layer = PEER(8, num_experts=16, heads=2, experts_per_head=2, key_dim=4).eval()
    x = torch.randn(5, 8)
    before = layer(x)
    add_pack(layer, "law")
    after = layer(x)
    save_pack(layer, "law", tmp_path / "law", data={"files": ["a.txt"]}, metrics={"perplexity": 3.5})
    assert json.loads((tmp_path / "law" / "manifest.json").read_text())["layers"] == {"": 9}
    unload_pack(layer, "law")
    assert torch.equal(layer(x), before)
    load_pack(layer, tmp_path / "law")
    assert torch.equal(layer(x), after)


def test_a_layer_with_packs_is_not_observed() -> None:
    model = small_model()
    add_pack(model, "law")
    with pytest.raises(ValueError, match=r"0\.ffw' has packs, which change what it retrieves; unload them"):
        observe(model, [{"input_ids": torch.zeros(1, 4, dtype=torch.int64)}])
