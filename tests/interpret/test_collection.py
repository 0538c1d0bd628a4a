"""One pass over a text, against the layers' own outputs and loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from peerlm import UserError
from peerlm.interpret import collect, find_inspected_layers
from peerlm.interpret.inspected import find_inspected_layer
from peerlm.interpret.windows import windows_of
from peerlm.model import PeerConfig, PeerForCausalLM
from peerlm.testing import assert_within_budget, definition, float64
from peerlm.usage import record_usage

TOKENS = torch.randint(320, (45,), generator=torch.Generator().manual_seed(3))
VARIANTS = {
    "peer": ("peer", {}),
    "gated": ("peer", {"gated": True, "activation": "silu"}),
    "per head, shells, scaled": ("peer", {"shared_keys": False, "pairing": "shells", "weight_scale": 3.0}),
    "sigmoid, relu": ("peer", {"weighting": "sigmoid", "activation": "relu"}),
    "memory": ("pkm", {"weight_scale": 2.0}),
}


def outputs_of(model, layers):
    """What each layer wrote at every token, windows of 16."""
    kept = {layer.number: [] for layer in layers}
    handles = [
        layer.module.register_forward_hook(lambda m, a, y, number=layer.number: kept[number].append(y[0]))
        for layer in layers
    ]
    with torch.no_grad():
        for start, end in windows_of(len(TOKENS), 16):
            model(input_ids=TOKENS[start:end][None])
    for handle in handles:
        handle.remove()
    return {number: torch.cat(parts) for number, parts in kept.items()}


def written_by(layer, record):
    """The sum of strengths times vectors, (S, D)."""
    strength = record.weight_SM * record.activation_SM
    return (strength[..., None] * layer.vectors(record.expert_SM.clamp_min(0))).sum(dim=1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("float64")
def test_strengths_times_vectors_are_what_the_layer_writes(variant, new_model):
    kind, settings = VARIANTS[variant]
    model = new_model(kind, **settings)
    layers = find_inspected_layers(model)
    collected = collect(model, layers, TOKENS, context=16, shown=40, experts_per_token=99)
    outputs = outputs_of(model, layers)
    for layer, record in zip(layers, collected.layers, strict=True):
        torch.testing.assert_close(written_by(layer, record), outputs[layer.number][:40])
        assert record.share_S.tolist() == pytest.approx([1.0] * 40)
        assert record.fired_S.tolist() == (record.expert_SM >= 0).sum(dim=1).tolist()
        norms = layer.vectors(torch.arange(64)).norm(dim=-1)
        torch.testing.assert_close(record.norm_N, norms)


@pytest.mark.parametrize("row_format", ["float32", "int8", "bfloat16"])
def test_rows_of_any_format_write_what_is_recorded(row_format, new_model):
    model = new_model()
    for layer in find_inspected_layers(model):
        layer.module.experts.convert_rows(row_format)
    layers, judge = find_inspected_layers(model), definition(model)
    collected, plain = (
        collect(model, layers, TOKENS, context=16, shown=40, experts_per_token=99),
        outputs_of(model, layers),
    )
    with float64():
        exact = outputs_of(judge, find_inspected_layers(judge))
    for layer, record in zip(layers, collected.layers, strict=True):
        assert_within_budget(written_by(layer, record), plain[layer.number][:40], exact[layer.number][:40])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("float64")
def test_use_importance_and_contexts_are_those_of_a_loop(variant, new_model):
    kind, settings = VARIANTS[variant]
    model = new_model(kind, **settings)
    layers = find_inspected_layers(model)
    collected = collect(model, layers, TOKENS, context=16, shown=45, experts_per_token=99, contexts_per_expert=3)
    with record_usage(model) as usage, torch.no_grad():
        outputs_of(model, layers)
    for layer, record in zip(layers, collected.layers, strict=True):
        theirs = usage[layer.name + ".product_keys"]
        torch.testing.assert_close(record.usage.weight_N, theirs.weight_N)
        assert record.usage.retrievals_N.equal(theirs.retrievals_N)
        importance = [0.0] * 64
        places = {expert: [] for expert in range(64)}
        for token in range(45):
            for slot in range(record.expert_SM.shape[1]):
                expert = int(record.expert_SM[token, slot])
                if expert >= 0:
                    strength = float(record.weight_SM[token, slot] * record.activation_SM[token, slot])
                    importance[expert] += abs(strength) * float(record.norm_N[expert])
                    places[expert].append((-abs(strength), token))
        assert record.importance_N.tolist() == pytest.approx(importance)
        for expert, found in places.items():
            best = [token for _, token in sorted(found)[:3]]
            assert record.contexts.position_NC[expert].tolist() == best + [-1] * (3 - len(best))


@pytest.mark.usefixtures("float64")
def test_half_use_adds_up_to_the_use_of_experts(new_model):
    model = new_model(pairing="shells")
    layers = find_inspected_layers(model)
    record = collect(model, layers, TOKENS, context=16, shown=1).layers[0]
    grid = torch.zeros(8, 8, dtype=torch.float64)
    for expert, weight in enumerate(record.usage.weight_N.tolist()):
        shell = math.isqrt(expert)
        rest = expert - shell * shell
        i, j = (rest, shell) if rest < shell else (shell, rest - shell)
        grid[i, j] += weight
    torch.testing.assert_close(record.half_use_2Hn.sum(dim=1), torch.stack([grid.sum(dim=1), grid.sum(dim=0)]))
    assert record.half_use_2Hn[0].sum(dim=1).tolist() == pytest.approx([45, 45])  # softmax: 1 for each token and head


@pytest.mark.usefixtures("float64")
def test_losses_and_predictions_are_those_of_each_window_alone(new_model):
    model = new_model()
    collected = collect(model, find_inspected_layers(model), TOKENS, context=16, shown=20)
    for start, end in windows_of(45, 16):
        with torch.no_grad():
            logits = model(input_ids=TOKENS[start:end][None]).logits[0]
        assert collected.nats[start].isnan()
        expected = F.cross_entropy(logits[:-1], TOKENS[start + 1 : end], reduction="none")
        torch.testing.assert_close(collected.nats[start + 1 : end], expected)
        for place in range(start, min(end, 20)):
            best = logits[place - start].softmax(dim=-1).sort(descending=True)
            assert collected.predicted[place].tolist() == best.indices[:5].tolist()
            torch.testing.assert_close(collected.probability[place], best.values[:5])
    assert collected.loss == pytest.approx(collected.nats[~collected.nats.isnan()].mean().item())


def test_hooks_are_gone_afterwards(new_model):
    model = new_model()
    with pytest.raises(ValueError, match="1 tokens to read; give at least 2"):
        collect(model, find_inspected_layers(model), TOKENS[:1], context=16, shown=4)
    collect(model, find_inspected_layers(model), TOKENS, context=16, shown=4)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_layers_are_numbered_by_their_blocks(new_model):
    layers = find_inspected_layers(new_model())
    assert [(layer.number, layer.name) for layer in layers] == [(1, "model.layers.1.ffw"), (2, "model.layers.2.ffw")]
    assert find_inspected_layer(layers, "model.layers.2.ffw", 0) is find_inspected_layer(layers, 2, 63) is layers[1]
    with pytest.raises(UserError, match=r"layer is 0; the layers with experts are 1 \(model.layers.1.ffw\), 2"):
        find_inspected_layer(layers, 0, 0)
    with pytest.raises(UserError, match="expert is 64; layer 1 has experts 0 to 63"):
        find_inspected_layer(layers, 1, 64)
    both = torch.nn.ModuleList([layers[0].module, layers[1].module])
    named = torch.nn.ModuleDict({"a": both[0], "b": both[1]})
    assert [layer.number for layer in find_inspected_layers(named)] == [0, 1]


def test_a_model_without_experts_is_one_sentence():
    config = PeerConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, ffw_layers="dense")
    with pytest.raises(UserError, match="PeerForCausalLM has no PEER layer and no product-key memory"):
        find_inspected_layers(PeerForCausalLM(config))
