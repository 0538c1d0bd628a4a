"""Padding stays out of the statistics of queries in converted models, under gradient checkpointing too."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from peerlm.convert import convert
from peerlm.convert.token_mask import TokenMask

from ..models import ARCHITECTURES, PEER_SETTINGS, batch, build

TEXT = [name for name in ARCHITECTURES if name != "vit"]


def statistics(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.named_buffers() if "query_norm" in name}


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def awake(name: str, mode: str = "beside") -> PreTrainedModel:
    """A converted model in training mode, without dropout, whose PEER layers already do something."""
    no_dropout = {"dropout": 0.0, "attention_dropout": 0.0} if name == "opt" else {}
    model = convert(build(name, **no_dropout), mode=mode, **PEER_SETTINGS)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("experts.rows"):
                parameter.normal_()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


@pytest.mark.parametrize("mode", ["beside", "replace"])
@pytest.mark.parametrize("name", TEXT)
@pytest.mark.usefixtures("float64")
def test_what_stands_at_padding_does_not_matter(name: str, mode: str) -> None:
    model = awake(name, mode)
    twin, initial, inputs = copy.deepcopy(model), statistics(model), batch(model, masked=True)
    real = inputs["attention_mask"].bool()
    other = inputs | {"input_ids": inputs["input_ids"].masked_fill(~real, 5)}
    assert not torch.equal(other["input_ids"], inputs["input_ids"])
    torch.testing.assert_close(model(**inputs).logits[real], twin(**other).logits[real])
    for key, value in statistics(model).items():
        torch.testing.assert_close(value, statistics(twin)[key])
        assert not torch.equal(value, initial[key])


def test_the_mask_may_be_given_by_position() -> None:
    model: Any = awake("llama")
    twin, inputs = copy.deepcopy(model), batch(model, masked=True)
    model.model(**inputs)
    twin.model(inputs["input_ids"], inputs["attention_mask"])
    assert all(torch.equal(value, statistics(twin)[key]) for key, value in statistics(model).items())


def test_a_mask_does_not_outlive_its_pass() -> None:
    model, hidden = awake("llama"), torch.randn(2, 9, 16)
    fresh = copy.deepcopy(model.get_submodule("model.layers.0.mlp"))
    with torch.no_grad():
        model(**batch(model, masked=True))
        assert torch.equal(model.get_submodule("model.layers.0.mlp")(hidden), fresh(hidden))


def test_a_mask_does_not_outlive_a_pass_that_fails() -> None:
    model, hidden = awake("llama"), torch.randn(2, 9, 16)
    fresh = copy.deepcopy(model.get_submodule("model.layers.0.mlp"))

    def fail(module: torch.nn.Module, arguments: Any) -> None:
        raise RuntimeError("no memory")

    with torch.no_grad():
        handle = model.get_submodule("model.layers.1").register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="no memory"):
            model(**batch(model, masked=True))
        handle.remove()
        fresh.load_state_dict(model.get_submodule("model.layers.0.mlp").state_dict())
        assert torch.equal(model.get_submodule("model.layers.0.mlp")(hidden), fresh(hidden))


def test_a_mask_comes_to_the_device_of_the_layer() -> None:
    masks = TokenMask()
    masks.attention_mask = torch.ones(2, 9)
    for shape in ((2, 9, 16), (18, 16)):
        mask = masks.of(torch.empty(*shape, device="meta"))
        assert mask is not None
        assert mask.device.type == "meta"


@pytest.mark.usefixtures("float64")
def test_a_pass_without_a_mask_counts_all_tokens() -> None:
    model = awake("llama")
    twin, ids = copy.deepcopy(model), batch(model)["input_ids"]
    with torch.no_grad():
        model(**batch(model, masked=True))
        twin(**batch(model, masked=True))
        model(input_ids=ids)
        twin(input_ids=ids, attention_mask=torch.ones_like(ids))
    for key, value in statistics(model).items():
        torch.testing.assert_close(value, statistics(twin)[key])


def test_images_have_no_mask() -> None:
    model = awake("vit")
    before = statistics(model)
    model(**batch(model))
    assert not any(torch.equal(value, before[key]) for key, value in statistics(model).items())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", ["beside", "replace"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "peer"])
def test_gradient_checkpointing_changes_nothing(name: str, mode: str, reentrant: bool) -> None:
    """Two passes before the backward pass, with other masks: each block's own comes back."""
    model = awake(name, mode).double()
    twin = copy.deepcopy(model)
    # transformers renamed it after 5.20, the last release for Python 3.10
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
        twin.enable_input_require_grads()
    passes = [batch(model, seed=1, masked=True), batch(model, seed=2)]
    for each in (model, twin):
        losses = [each(**inputs, use_cache=False).logits.square().mean() for inputs in passes]
        sum(losses, torch.zeros(())).backward()
    for key, value in statistics(model).items():
        torch.testing.assert_close(value, statistics(twin)[key])
    found, expected = gradients(model), gradients(twin)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], msg=key)


@pytest.mark.usefixtures("float64")
def test_an_encoder_and_a_decoder_have_masks_of_their_own() -> None:
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    config.dropout_rate = 0.0
    model = convert(T5ForConditionalGeneration(config), **PEER_SETTINGS).train()
    twin, initial = copy.deepcopy(model), statistics(model)
    ids = torch.randint(3, 64, (2, 6), generator=torch.Generator().manual_seed(0))
    masks = {"attention_mask": torch.ones_like(ids), "decoder_attention_mask": torch.ones_like(ids)}
    masks["attention_mask"][0, 3:] = 0
    masks["decoder_attention_mask"][1, 2:] = 0
    real = {name: mask.bool() for name, mask in masks.items()}
    model(input_ids=ids, decoder_input_ids=ids, **masks)
    twin(
        input_ids=ids.masked_fill(~real["attention_mask"], 5),
        decoder_input_ids=ids.masked_fill(~real["decoder_attention_mask"], 5),
        **masks,
    )
    assert len(initial) == 2 * 4
    for key, value in statistics(model).items():
        torch.testing.assert_close(value, statistics(twin)[key])
        assert not torch.equal(value, initial[key])
