"""Feed-forward layers are found by structure: their neurons compute what the model computes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from peerlm.convert import FFW, find_ffws
from peerlm.layers import DenseFFW

from ..models import ARCHITECTURES, MIXTURES, batch, build

GATED = {"llama", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "phi3", "peer_swiglu"}
SPREAD = {"opt", "bert"}


def reads_and_writes(model: nn.Module, ffw: FFW, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What the first map reads and the last one writes, in a pass of the model."""
    seen: dict[str, Tensor] = {}
    first, last = model.get_submodule(ffw.down.path), model.get_submodule(ffw.up.path)
    handles = [
        first.register_forward_hook(lambda module, args, output: seen.update(x=args[0].flatten(0, -2))),
        last.register_forward_hook(lambda module, args, output: seen.update(y=output.flatten(0, -2))),
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return seen["x"], seen["y"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_neurons_compute_what_the_layer_computes(name: str) -> None:
    model = build(name).double()
    ffws = find_ffws(model)
    assert len(ffws) == 3
    for ffw in ffws:
        assert (ffw.dim, ffw.gated, ffw.spread) == (16, name in GATED, name in SPREAD)
        x, y = reads_and_writes(model, ffw, batch(model, seed=1))
        neurons = ffw.neurons()
        assert neurons.down.shape == neurons.up.shape == (ffw.hidden, 16)
        torch.testing.assert_close(neurons(x), y, rtol=1e-10, atol=1e-12)
        if not ffw.spread:
            with torch.no_grad():
                torch.testing.assert_close(neurons(3 * x), model.get_submodule(ffw.path)(3 * x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert"])
def test_layers_are_found_in_bfloat16_too(name: str) -> None:
    wide, narrow = find_ffws(build(name)), find_ffws(build(name).bfloat16())
    assert [(f.path, f.activation, f.gated) for f in wide] == [(f.path, f.activation, f.gated) for f in narrow]


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"])
def test_activations_are_told_apart_even_where_weights_are_tiny(activation: str) -> None:
    model = build("phi", hidden_act=activation)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e-3)
    names = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
    assert {ffw.activation for ffw in find_ffws(model)} == {names.get(activation, activation)}


def test_an_activation_that_we_lack_matters_only_for_neurons() -> None:
    ffw = find_ffws(build("phi", hidden_act="quick_gelu"))[0]
    assert ffw.activation == "QuickGELUActivation"
    with pytest.raises(ValueError, match=r"the activation of model.layers.0.mlp is QuickGELUActivation; neurons can"):
        ffw.neurons()


def test_an_activation_that_is_a_function_is_recognised() -> None:
    model: Any = build("opt")
    for layer in model.model.decoder.layers:
        del layer.activation_fn
        layer.activation_fn = F.silu
    for ffw in find_ffws(model):
        assert (ffw.activation, ffw.activation_path) == ("silu", None)


def test_the_model_is_left_as_it_was() -> None:
    model = build("llama").train()
    model.model.layers[0].mlp.eval()
    modes = [module.training for module in model.modules()]
    find_ffws(model)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_of_experts_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=r"has mixtures of experts in its blocks, such as model.layers.0"):
        find_ffws(build(name))


class ListOfExperts(nn.Module):
    """A mixture as a list of feed-forward layers."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(DenseFFW(16) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.parts[0](x) + self.parts[1](x)


def test_experts_in_a_list_are_no_dense_layers() -> None:
    model: Any = build("peer")
    model.model.layers[1].ffw = ListOfExperts()
    assert [ffw.path for ffw in find_ffws(model)] == ["model.layers.0.ffw", "model.layers.2.ffw"]
    for layer in model.model.layers:
        layer.ffw = ListOfExperts()
    with pytest.raises(ValueError, match=r"mixtures of experts in its blocks, such as model.layers.0.ffw.parts"):
        find_ffws(model)


def test_a_model_without_dense_layers() -> None:
    model = build("peer", ffw_layers="pkm", pkm={"num_values": 16, "heads": 2, "values_per_head": 3, "key_dim": 8})
    with pytest.raises(ValueError, match="PeerForCausalLM has no dense feed-forward layer in its blocks"):
        find_ffws(model)


def test_two_maps_without_an_activation_are_no_layer() -> None:
    with pytest.raises(ValueError, match="PhiForCausalLM has no dense feed-forward layer in its blocks"):
        find_ffws(build("phi", hidden_act="linear"))


def test_a_model_that_cannot_read_random_tokens_alone_asks_for_inputs() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text, vision = {**sizes, "vocab_size": 64}, {**sizes, "image_size": 8, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision))
    with pytest.raises(ValueError, match=r"CLIPModel cannot read random input_ids \(.+\); pass inputs=, the arguments"):
        find_ffws(model)
    both = {"input_ids": torch.ones(2, 5, dtype=torch.int64), "pixel_values": torch.rand(2, 3, 8, 8)}
    assert len(find_ffws(model, both)) == 2


def test_a_model_that_reads_something_else_is_given_its_inputs() -> None:
    model: Any = build("llama")
    model.main_input_name = "input_values"
    with pytest.raises(ValueError, match="LlamaForCausalLM reads input_values; pass inputs="):
        find_ffws(model)
    assert len(find_ffws(model, batch(model))) == 3
