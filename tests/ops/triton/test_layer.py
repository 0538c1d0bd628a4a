"""Whole layers, packs, neurons and a language model on Triton: compiled, exported, checkpointed, loaded, generating."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peerlm import PEER, PeerConfig, PeerForCausalLM
from peerlm.convert.neurons.layer import NeuronLayer
from peerlm.packs.api import new_pack

SETTINGS = {"num_experts": 9, "heads": 1, "experts_per_head": 2, "key_dim": 8, "backend": "triton"}


def layer(device: torch.device, **settings: object) -> PEER:
    torch.manual_seed(0)
    return PEER(16, **SETTINGS, **settings).to(device)


def output_and_gradients(peer: PEER, call: object, x: Tensor) -> list[Tensor]:
    peer.zero_grad()
    leaf = x.clone().requires_grad_()
    y = call(leaf)
    y.square().sum().backward()
    return [y.detach(), leaf.grad, *(each.grad for each in peer.parameters() if each.grad is not None)]


@pytest.mark.filterwarnings("default")  # torch.compile warns of what it does
def test_a_layer_compiled_in_one_graph_has_the_same_bits(device: torch.device) -> None:
    torch._dynamo.reset()
    peer, x = layer(device, row_format="float8_e4m3fn", query_norm="none"), torch.randn(2, 16, device=device)
    compiled = torch.compile(peer, fullgraph=True, backend="aot_eager")
    for found, right in zip(*(output_and_gradients(peer, call, x) for call in (compiled, peer)), strict=True):
        assert torch.equal(found, right)


def test_an_exported_layer_takes_any_number_of_tokens(device: torch.device) -> None:
    peer = layer(device, row_format="float8_e4m3fn").eval()
    tokens = torch.export.Dim("tokens", min=2, max=64)
    exported = torch.export.export(peer, (torch.randn(2, 16, device=device),), dynamic_shapes={"x": {0: tokens}})
    for count in (2, 3):
        x = torch.randn(count, 16, device=device)
        assert torch.equal(exported.module()(x), peer(x))


def test_gradient_checkpointing_has_the_same_bits(device: torch.device) -> None:
    peer, x = layer(device, gated=True, query_norm="none"), torch.randn(2, 16, device=device)
    again = output_and_gradients(peer, lambda leaf: checkpoint(peer, leaf, use_reentrant=False), x)
    for found, right in zip(again, output_and_gradients(peer, peer, x), strict=True):
        assert torch.equal(found, right)


def test_a_loaded_model_generates_the_same_with_a_static_cache(device: torch.device, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = PeerConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffw_layers="peer",
        peer={**SETTINGS, "row_format": "float8_e4m3fn"},
    )
    PeerForCausalLM(config).save_pretrained(tmp_path)
    model = PeerForCausalLM.from_pretrained(tmp_path, device_map=device.type).eval()
    assert model.model.layers[0].ffw.experts.row_format == "float8_e4m3fn"
    ids = torch.randint(32, (1, 1), device=device)
    options = {"max_new_tokens": 2, "do_sample": False}
    dynamic = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), dynamic)
    assert dynamic.shape == (1, 3)


def on_each_backend(module: nn.Module, x: Tensor) -> list[list[Tensor]]:
    """Output and gradients on the kernels, and by the definition in float64."""
    found = output_and_gradients(module, module, x)
    definition = copy.deepcopy(module).double()
    for part in definition.modules():
        if hasattr(part, "backend"):
            part.backend = "reference"
    return [found, output_and_gradients(definition, definition, x.double())]


def assert_alike(found: list[list[Tensor]]) -> None:
    for ours, right in zip(*found, strict=True):
        ours, right = ours.to_dense(), right.to_dense()
        torch.testing.assert_close(ours.double(), right, rtol=1e-4, atol=1e-5 * float(right.abs().max()))


def test_experts_of_packs_are_retrieved_and_mixed_with_the_layers_own(device: torch.device) -> None:
    peer = layer(device, query_norm="none").eval()
    for seed, (name, size) in enumerate({"law": 4, "code": 9}.items()):
        new_pack(peer, name, size, seed=seed)
        peer.packs.by_name()[name].table.fill(nn.init.normal_)
    x = torch.randn(3, 16, device=device)
    without = layer(device, query_norm="none").eval()
    assert not torch.equal(peer(x), without(x))
    assert_alike(on_each_backend(peer, x))


def test_neurons_of_a_dense_layer_are_retrieved(device: torch.device) -> None:
    torch.manual_seed(0)
    neurons = NeuronLayer(16, 9, share=0.4, heads=2, key_dim=4, gated=True, activation="silu", backend="triton").to(
        device
    )
    assert_alike(on_each_backend(neurons, torch.randn(3, 16, device=device)))
