"""The lens against what the model's own end makes of a small step along v."""

import pytest
import torch
from transformers import GemmaConfig, GemmaForCausalLM, GPT2Config, GPT2LMHeadModel

from peerlm import UserError
from peerlm.convert import convert
from peerlm.interpret import collect, find_inspected_layers, find_readout
from peerlm.interpret.lens import Readout, pushes

SETTINGS = {"num_experts": 16, "heads": 2, "experts_per_head": 2, "key_dim": 8}


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32))


def gemma():
    config = GemmaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
    )
    return GemmaForCausalLM(config)


@pytest.mark.parametrize("build", ["peer", "gpt2", "gemma"])
@pytest.mark.usefixtures("float64")
def test_lens_is_the_slope_of_the_logits(build, new_model):
    torch.manual_seed(0)
    model = {"peer": lambda: new_model(vocab_size=64), "gpt2": gpt2, "gemma": gemma}[build]().eval()
    with torch.no_grad():
        norm = dict(model.named_modules())[
            {"peer": "model.norm", "gpt2": "transformer.ln_f", "gemma": "model.norm"}[build]
        ]
        norm.weight.uniform_(0.3, 2.0)
    readout = find_readout(model)
    assert readout.norm is norm
    h, v = torch.randn(2, 16, dtype=torch.float64)
    centred = h - h.mean() if build == "gpt2" else h
    v = v - (v @ centred) / (centred @ centred) * centred  # a step across h leaves the norm's scale, to first order
    model.double()
    logits = [model.get_output_embeddings()(norm((h + step * v)[None, None]))[0, 0] for step in (1e-5, -1e-5)]
    slope = (logits[0] - logits[1]) / 2e-5
    eps = 1e-5 if build == "gpt2" else 1e-6
    gain = 1 if build == "gpt2" else (1 + eps) ** 0.5  # measured on vectors of ones, to which the norm adds eps too
    lens = readout.lens(v, gain * (centred.square().mean() + eps).rsqrt().item())
    torch.testing.assert_close(lens, slope - slope.mean())


@pytest.mark.usefixtures("float64")
def test_the_scale_is_the_mean_over_tokens(new_model):
    model = new_model()
    tokens = torch.arange(40)
    readout = find_readout(model)
    collected = collect(model, find_inspected_layers(model), tokens, context=16, shown=1, readout=readout)
    seen = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for window in tokens.split(16):
            model(input_ids=window[None])
    handle.remove()
    assert collected.inverse_scale == pytest.approx((1 / torch.cat(seen).square().mean(dim=-1).sqrt()).mean().item())


@pytest.mark.usefixtures("float64")
def test_pushes_are_the_ends_of_the_lens(new_model):
    model = new_model()
    layer, readout = find_inspected_layers(model)[0], find_readout(model)
    ids = torch.tensor([3, 60])
    ends = pushes(readout, layer, ids, kept=4, inverse_scale=0.5)
    for row, expert in enumerate(ids.tolist()):
        vector = (layer.module.experts.up[expert] * model.model.norm.weight).detach()
        lens = [0.5 * float(vector @ token) for token in model.lm_head.weight.detach()]
        mean = sum(lens) / len(lens)
        order = sorted(range(len(lens)), key=lambda token: -lens[token])
        assert ends.up[row].tolist() == order[:4]
        assert ends.down[row].tolist() == order[::-1][:4]
        assert ends.up_value[row].tolist() == pytest.approx([lens[token] - mean for token in order[:4]])
        assert ends.down_value[row].tolist() == pytest.approx([lens[t] - mean for t in order[::-1][:4]])


def test_without_a_norm_before_the_output_the_gain_is_one(new_model):
    model = new_model()
    model.model.norm = torch.nn.Identity()
    readout = find_readout(model)
    assert readout.norm is None
    assert readout.gain.tolist() == [1.0] * 16
    collected = collect(model, find_inspected_layers(model), torch.arange(20), context=16, shown=1, readout=readout)
    assert collected.inverse_scale == 1.0


def test_what_has_no_lens_says_so(new_model, monkeypatch):
    model = new_model()
    readout = Readout(weight=torch.zeros(5, 12), gain=torch.ones(12), norm=None)
    with pytest.raises(UserError, match=r"model.layers.1.ffw writes 16 features, but the output embedding reads 12"):
        pushes(readout, find_inspected_layers(model)[0], torch.tensor([0]), kept=2, inverse_scale=1.0)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    with pytest.raises(UserError, match="PeerForCausalLM has no output embedding"):
        find_readout(model)


def test_a_converted_model_is_read_too():
    torch.manual_seed(0)
    model = convert(gpt2().eval(), layers=[1], **SETTINGS)
    layers = find_inspected_layers(model)
    assert [layer.number for layer in layers] == [1]
    collected = collect(model, layers, torch.arange(30), context=16, shown=4, readout=find_readout(model))
    assert collected.layers[0].usage.retrievals_N.sum() == 30 * 4


def test_values_behind_a_gate_are_not_inspected(new_model):
    with pytest.raises(UserError, match=r"values of model.layers.1.ffw go through a gate, .* depends on the token"):
        find_inspected_layers(new_model("pkm", gated=True))
