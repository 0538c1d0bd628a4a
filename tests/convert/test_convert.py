"""Converting: what is refused, what is recorded, how it loads, and how it trains."""

import copy
import json
import pickle
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from peerlm.convert import convert, find_ffws, unconvert
from peerlm.convert.insertion import FFWSite, put_beside
from peerlm.convert.record import ConversionConfig
from peerlm.layers import PEER
from peerlm.optim import RowAdamW, parameter_groups
from peerlm.testing import assert_within_budget, definition, float64

from ..models import PEER_SETTINGS, batch, build, logits
from .test_convert_architectures import equal_states, train_a_little, trainer


def peers_of(model: torch.nn.Module) -> dict[str, PEER]:
    return {path: module for path, module in model.named_modules() if isinstance(module, PEER)}


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(None, [0, 1, 2]), ("middle", [1]), (0, [0]), ([-1, 0], [0, 2]), ((2, 2), [2])],
)
def test_layers_are_chosen(layers: Any, expected: list[int]) -> None:
    model = convert(build("llama"), layers=layers, **PEER_SETTINGS)
    assert list(peers_of(model)) == [f"model.layers.{index}.mlp.peer" for index in expected]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "instead"}, "mode is 'instead'; choose one of beside, replace"),
        ({"init": "zeros"}, "init is 'zeros'; with mode='beside' choose one of random"),
        ({"layers": 3}, "layers has 3, but LlamaForCausalLM has 3 dense feed-forward layers; take numbers from 0 to 2"),
        ({"layers": [0, -4]}, "layers has -4"),
        ({"layers": "last"}, "layers is 'last'; give numbers of layers, 'middle', or None for all"),
        ({"layers": []}, "layers is []; give numbers"),
        ({"layers": [True]}, "layers is [True]; give numbers"),
        ({"num_expert": 64}, "PEER has no setting 'num_expert'; did you mean 'num_experts'?"),
        ({"num_experts": 60}, "num_experts is 60, which is not a square number"),
        ({"num_experts": 9}, "experts_per_head is 4, more than the 3 sub-keys"),
        ({"row_format": "int8"}, "row_format is 'int8', whose rows are not trained"),
    ],
)
def test_mistakes_are_named_and_change_nothing(arguments: dict[str, Any], message: str) -> None:
    model = build("llama")
    before, config = str(model), model.config.to_dict()
    with pytest.raises(ValueError, match=re.escape(message)):
        convert(model, **(PEER_SETTINGS | arguments))
    assert (str(model), model.config.to_dict()) == (before, config)


@pytest.mark.parametrize("layers", [None, "middle"])
def test_a_mixture_of_experts_is_refused_unless_dense_layers_are_named(layers: str | None) -> None:
    model = build("expert_choice", ffw_layers=["dense", "expert_choice", "dense"])
    with pytest.raises(ValueError, match=r"mixtures of experts in its blocks, such as model.layers.1.ffw"):
        convert(model, layers=layers, **PEER_SETTINGS)
    convert(model, layers=1, **PEER_SETTINGS)
    assert list(peers_of(model)) == ["model.layers.2.ffw.peer"]


def test_converting_twice_and_undoing_what_cannot_be_undone() -> None:
    model = build("llama")
    with pytest.raises(ValueError, match="LlamaForCausalLM is not converted; there is nothing to undo"):
        unconvert(model)
    convert(model, layers=0, **PEER_SETTINGS)
    with pytest.raises(ValueError, match=r"is converted already; unconvert\(model\) first"):
        convert(model, layers=1, **PEER_SETTINGS)
    replaced = convert(build("llama"), mode="replace", layers=0, **PEER_SETTINGS)
    with pytest.raises(ValueError, match="were replaced and are gone; take the model that was converted"):
        unconvert(replaced)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.usefixtures("float64")
def test_a_replacement_is_as_loud_as_what_it_replaces(name: str) -> None:
    model = build(name)
    ffws = find_ffws(model)
    convert(model, mode="replace", **PEER_SETTINGS)
    for ffw, peer in zip(ffws, peers_of(model).values(), strict=True):
        with torch.no_grad():
            loudness = peer(ffw.sample_input).square().mean()
        torch.testing.assert_close(loudness, ffw.sample_output.square().mean())


def test_a_quantised_model_is_refused() -> None:
    model = build("llama")
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(ValueError, match="LlamaForCausalLM is quantised; convert it before"):
        convert(model, **PEER_SETTINGS)


def test_a_spread_layer_whose_activation_is_a_function_stays() -> None:
    model: Any = build("opt")
    for layer in model.model.decoder.layers:
        del layer.activation_fn
        layer.activation_fn = torch.nn.functional.relu
    with pytest.raises(ValueError, match=r"fc2 is spread over its block and calls its activation as a function"):
        convert(model, mode="replace", **PEER_SETTINGS)
    before = logits(model, batch(model))
    assert torch.equal(logits(convert(model, **PEER_SETTINGS), batch(model)), before)


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("mode", ["beside", "replace"])
def test_a_bfloat16_model_stays_one(name: str, mode: str, tmp_path: Path) -> None:
    model = build(name).bfloat16()
    before = logits(model, batch(model))
    convert(model, mode=mode, **PEER_SETTINGS)
    after = logits(model, batch(model))
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    assert torch.equal(after.view(torch.int16), before.view(torch.int16)) == (mode == "beside")
    train_a_little(model)
    model.save_pretrained(tmp_path)
    assert equal_states(model, type(model).from_pretrained(tmp_path))
    wide = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    assert {tensor.dtype for tensor in wide.state_dict().values()} == {torch.float32}
    assert torch.equal(wide.get_parameter("lm_head.weight"), model.get_parameter("lm_head.weight").float())
    assert all(
        torch.equal(wide_peer.experts.rows, peer.experts.rows.float())
        for wide_peer, peer in zip(peers_of(wide).values(), peers_of(model).values(), strict=True)
    )


def test_bfloat16_tables_in_a_float32_model(tmp_path: Path) -> None:
    model = convert(build("llama"), layers=0, row_format="bfloat16", **PEER_SETTINGS)
    train_a_little(model)
    (peer,) = peers_of(model).values()
    assert peer.experts.rows.dtype == torch.bfloat16
    assert peer.product_keys.sub_keys.dtype == torch.float32
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert equal_states(model, loaded)
    assert next(iter(peers_of(loaded).values())).experts.rows.dtype == torch.bfloat16


def test_loading_by_other_classes_and_onto_a_device(tmp_path: Path) -> None:
    model = convert(build("llama"), layers=[0, 2], **PEER_SETTINGS)
    train_a_little(model)
    model.save_pretrained(tmp_path)
    rows = [peer.experts.rows for peer in peers_of(model).values()]
    base = AutoModel.from_pretrained(tmp_path)
    assert list(peers_of(base)) == ["layers.0.mlp.peer", "layers.2.mlp.peer"]
    for other in (
        base,
        AutoModelForCausalLM.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu"),
        AutoModelForSequenceClassification.from_pretrained(tmp_path),
    ):
        assert all(torch.equal(p.experts.rows, r) for p, r in zip(peers_of(other).values(), rows, strict=True))
    base.save_pretrained(tmp_path / "base")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert all(torch.equal(p.experts.rows, r) for p, r in zip(peers_of(back).values(), rows, strict=True))
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.bfloat16}
    unconvert(half)
    assert not peers_of(half)


def test_a_base_model_that_was_converted_gets_a_head(tmp_path: Path) -> None:
    base = convert(AutoModel.from_config(build("llama").config), layers=1, **PEER_SETTINGS)
    base.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert list(peers_of(model)) == ["model.layers.1.mlp.peer"]


def test_a_loaded_model_is_not_marked_as_quantised(tmp_path: Path) -> None:
    convert(build("llama"), **PEER_SETTINGS).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not getattr(loaded, "is_quantized", False)
    assert not hasattr(loaded.config, "_is_quantized")
    assert loaded.half().float().dtype == torch.float32


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = convert(build("llama", tie_word_embeddings=True), **PEER_SETTINGS)
    train_a_little(model)
    model.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    for tied in (model, loaded):
        assert tied.lm_head.weight is tied.model.embed_tokens.weight  # type: ignore[attr-defined]


def test_the_configuration_records_the_conversion(tmp_path: Path) -> None:
    convert(build("opt"), layers=0, **PEER_SETTINGS).save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert record == {
        "quant_method": "peerlm",
        "mode": "beside",
        "init": "random",
        "settings": PEER_SETTINGS,
        "sites": [
            {
                "path": "model.decoder.layers.0.fc2",
                "first": "model.decoder.layers.0.fc1",
                "activation_path": "model.decoder.layers.0.activation_fn",
                "dim": 16,
                "hidden": 24,
                "activation": "relu",
                "gated": False,
                "biases": True,
                "output_bias": True,
            }
        ],
    }


def edit_record(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def test_records_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = convert(build("llama"), layers=0, **PEER_SETTINGS)
    model.save_pretrained(tmp_path)
    record = model.config.quantization_config
    edit_record(tmp_path, init="of tomorrow")
    with pytest.raises(ValueError, match=r"init='of tomorrow', which this version of peerlm does not know \(random, "):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    edit_record(tmp_path, init="random", sites=[record.sites[0] | {"path": "model.layers.9.mlp"}])
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no module model.layers.9.mlp, which the configuration"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    for damage in (
        {"settings": {"nonsense": 1}},
        {"settings": [1]},
        {"sites": [{"path": "model"}]},
        {"mode": "inside"},
    ):
        edit_record(tmp_path, **(vars(record) | damage))
        with pytest.raises(ValueError, match=r"record of a conversion cannot be read \(.+\); restore config.json, or"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]["init"], config["quantization_config"]["sites"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"record of a conversion cannot be read \(it lacks init, sites\); restore"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    build("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="a saved model cannot be converted while it is loaded; load it, then call"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense",
            quantization_config=ConversionConfig(mode="beside", init="random", settings={}, sites=[]),
        )


def test_only_what_is_converted_is_refused(tmp_path: Path) -> None:
    model = convert(build("llama"), layers=0, **PEER_SETTINGS)
    other = pickle.loads(pickle.dumps(model))
    other.save_pretrained(tmp_path / "pickled")
    assert equal_states(AutoModelForCausalLM.from_pretrained(tmp_path / "pickled"), model)
    unconvert(model).save_pretrained(tmp_path / "plain")
    assert "transformers_weights" not in (tmp_path / "plain" / "config.json").read_text()


def test_row_adamw_trains_a_converted_model_under_the_stock_trainer(tmp_path: Path) -> None:
    model = convert(build("gpt2"), layers=[0, 2], **PEER_SETTINGS)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("peer" in name)
    before = copy.deepcopy(model)
    groups = parameter_groups(model)
    sizes = {group["name"]: len(group["params"]) for group in groups}
    assert sizes == {"matrix": 2, "vector": 4, "table": 2, "keys": 2}
    stock = trainer(model, tmp_path, optimizers=(RowAdamW(groups, lr=1e-2), None))
    sparse: list[bool] = []
    for peer in peers_of(model).values():
        peer.experts.rows.register_post_accumulate_grad_hook(
            lambda rows: sparse.append(rows.grad is not None and rows.grad.is_sparse)
        )
    stock.train()
    assert sparse == [True] * 40
    losses = [row["loss"] for row in stock.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    for (name, parameter), old in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(parameter, old) != ("peer" in name), name


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), [("llama", "beside"), ("llama", "replace"), ("opt", "beside")])
def test_a_compiled_model_computes_the_same(name: str, mode: str) -> None:
    torch._dynamo.reset()
    model = convert(build(name, num_hidden_layers=2), mode=mode, layers=1, **PEER_SETTINGS)
    train_a_little(model)
    inputs = batch(model, masked=True)
    model.zero_grad()
    twin = copy.deepcopy(model).train()
    compiled = torch.compile(model.train(), backend="aot_eager")

    def loss_and_gradients(model: nn.Module, called: Callable[..., Any]) -> dict[str, Tensor]:
        loss = called(**inputs).logits.square().mean()
        loss.backward()
        gradients = {path: each.grad for path, each in model.named_parameters() if each.grad is not None}
        return {"loss": loss, **gradients}

    with float64():
        judge = definition(twin)
        exact = loss_and_gradients(judge, judge)
    assert_within_budget(loss_and_gradients(model, compiled), loss_and_gradients(twin, twin), exact)


def test_threads_that_read_at_once_do_not_meet() -> None:
    model = convert(build("opt"), **PEER_SETTINGS)  # between whose first map and last there is something to keep
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("experts.rows"):
                parameter.normal_()
    inputs = [batch(model, seed=seed) for seed in (0, 1)]
    expected = [logits(model, each) for each in inputs]
    meeting = threading.Barrier(2)

    def meet(*_: Any) -> None:
        meeting.wait(timeout=20)

    handle = find_ffws(model)[0].down.module.register_forward_hook(meet)  # both have read, and neither has written
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda each: logits(model, each), inputs))
    handle.remove()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("mode", ["beside", "replace"])
def test_another_model_of_the_same_configuration_is_not_converted(mode: str, tmp_path: Path) -> None:
    model = build("llama")
    other = type(model)(model.config).eval()
    convert(model, mode=mode, **PEER_SETTINGS)
    assert not hasattr(other.config, "quantization_config")
    for module in model.modules():
        assert getattr(module, "config", model.config) is model.config
    other.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, batch(other)), logits(other, batch(other)))
    convert(other, mode=mode, **PEER_SETTINGS)


def test_weights_that_are_not_in_memory_are_refused() -> None:
    with torch.device("meta"):
        model = type(build("llama"))(build("llama").config)
    with pytest.raises(ValueError, match=r"has weights that are not in memory, such as .*; load it whole"):
        convert(model, **PEER_SETTINGS)


def test_found_layers_of_a_shared_block_are_converted_once() -> None:
    model: Any = build("llama")
    model.model.layers[2] = model.model.layers[0]
    assert len(find_ffws(model)) == 2


class Constant(torch.nn.Module):
    """Whatever it reads, it writes one number."""

    def __init__(self, number: float):
        super().__init__()
        self.number = number

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return torch.full_like(x, self.number)


@pytest.mark.parametrize("output", [0.0, -0.0, 1.5])
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_adding_a_zero_of_either_sign_keeps_every_bit(output: float, zero: float) -> None:
    model: Any = build("llama")
    site = FFWSite.of(find_ffws(model)[0])
    model.model.layers[0].mlp = Constant(output)
    put_beside(model, {site: Constant(zero)})
    found = model.model.layers[0].mlp(torch.randn(2, 5, 16))
    assert torch.equal(found.view(torch.int32), torch.full((2, 5, 16), output).view(torch.int32))


def test_a_folder_saved_with_the_earlier_mark_gives_the_same_logits() -> None:
    folder = Path(__file__).parent / "saved"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["quant_method"] == "peerlm.surgery"
    expected = json.loads((folder / "logits.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids, twin = torch.tensor(expected["input_ids"]), definition(model)
    with torch.no_grad():
        found = model(ids).logits[0]
        with float64():
            exact = twin(ids).logits[0]
    assert_within_budget(found, torch.tensor(expected["logits"]), exact)
