"""The plugin for vLLM, with a stand-in for vLLM; `foreign/vllm/run.py` shows that vLLM itself runs the model."""

import ast
import importlib
import inspect
import sys
import textwrap
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from peerlm.model import PeerConfig, PeerForCausalLM
from peerlm.model.attention import PeerAttention
from peerlm.names import CONVERTED, CONVERTED_EARLIER
from peerlm.serve import vllm_plugin

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


PEER = {"num_experts": 16, "heads": 2, "experts_per_head": 2, "key_dim": 8}
MEMORY = {"num_values": 16, "heads": 2, "values_per_head": 2, "key_dim": 8}


def kept(found, name):
    """A decorator of classes."""
    return lambda decorated: found.setdefault(name, decorated)


@pytest.fixture
def registered(monkeypatch):
    """What was registered with the stand-in."""
    found = {}

    class TransformersForCausalLM:
        def __init__(self, *, vllm_config, prefix=""):
            self.built = (vllm_config, prefix)

    for name, content in (
        ("vllm", {"ModelRegistry": SimpleNamespace(register_model=found.__setitem__)}),
        ("vllm.model_executor", {}),
        ("vllm.model_executor.layers", {}),
        ("vllm.model_executor.layers.quantization", {"register_quantization_config": lambda name: kept(found, name)}),
        ("vllm.model_executor.layers.quantization.base_config", {"QuantizationConfig": object}),
        ("vllm.model_executor.models", {}),
        ("vllm.model_executor.models.transformers", {"TransformersForCausalLM": TransformersForCausalLM}),
    ):
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    vllm_plugin._model_class.cache_clear()
    yield found
    vllm_plugin._model_class.cache_clear()


def configured(**changes):
    config = PeerConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, **changes)
    return SimpleNamespace(model_config=SimpleNamespace(hf_config=config))


def test_the_architecture_is_registered_by_a_name_that_leads_to_the_class(registered):
    vllm_plugin.register()
    assert list(registered) == [PeerForCausalLM.__name__, CONVERTED]
    module, _, name = registered["PeerForCausalLM"].partition(":")
    config = configured(ffw_layers="dense")
    assert getattr(sys.modules[module], name)(vllm_config=config, prefix="p").built == (config, "p")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kv_shift": True}, "kv_shift"),
        ({"attention_sink": True}, "attention_sink"),
        ({"peer": {"row_format": "int8"}}, "peer rows in int8"),
        ({"peer": {"row_format": "float8_e4m3fn"}}, "peer rows in float8_e4m3fn"),
    ],
)
def test_a_model_that_would_be_wrong_is_refused(registered, changes, says):
    without = ", or train it with --set model.kv_shift=false" if says == "kv_shift" else ""
    with pytest.raises(ValueError, match=f"has {says}: use `peerlm serve`{without}$"):
        vllm_plugin.PeerForVllm(vllm_config=configured(ffw_layers="dense", **changes))


KINDS = {
    "dense": {"ffw_layers": ["dense", "swiglu"]},
    "narrow PEER": {"ffw_layers": "peer", "peer": PEER | {"row_dim": 8}},
    "gated memory": {"ffw_layers": "pkm", "pkm": MEMORY | {"gated": True}},
    "mixtures": {"ffw_layers": ["token_choice", "fine_grained_moe"], "token_choice": {"num_experts": 2, "hidden": 8}},
    "a gate per token": {"ffw_layers": "dense", "ffw_output_gate": "token"},
    "a gate per feature": {"ffw_layers": "dense+peer", "peer": PEER, "ffw_output_gate": "feature"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_linear_layers_can_be_replaced_by_plain_ones_as_vllm_does(kind):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = PeerConfig(**sizes, **KINDS[kind])
    assert not vllm_plugin.unsupported(config)
    model, ids = PeerForCausalLM(config).eval(), torch.randint(32, (2, 9))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)  # gates are not those of the start
        expected, replaced = model(ids).logits, 0
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, torch.nn.Linear):
                    plain = torch.nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
                    plain.load_state_dict(child.state_dict())
                    setattr(module, name, plain)
                    replaced += 1
        assert replaced > 2
        torch.testing.assert_close(model(ids).logits, expected)


def test_a_converted_model_is_refused_by_what_it_is(registered):
    vllm_plugin.register()
    check = registered[CONVERTED].override_quantization_method
    for method in (CONVERTED, CONVERTED_EARLIER):
        with pytest.raises(ValueError, match="converted: use `peerlm serve`"):
            check({"quant_method": method}, None)
    assert check({"quant_method": "fp8"}, None, hf_config=None) is None
    assert check(None, None) is None


def test_attention_is_called_as_vllm_looks_for_it():
    """By the source: a name gets what ALL_ATTENTION_FUNCTIONS gives, and is called once, with the scale."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(PeerAttention.forward)))
    looked_up = [
        node.targets[0].id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("ALL_ATTENTION_FUNCTIONS.get_interface(")
    ]
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in looked_up
    ]
    (call,) = calls
    assert ast.unparse(next(each.value for each in call.keywords if each.arg == "scaling")) == "self.scaling"


def test_layers_that_read_tokens_or_whole_batches_are_refused():
    for kind in ("hashed_ngrams", "expert_choice"):
        assert vllm_plugin.unsupported(SimpleNamespace(ffw_layers=["dense", f"{kind}+dense"])) == [f"{kind} layers"]


def test_other_names_are_not_there():
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        vllm_plugin.Other  # noqa: B018


def test_the_entry_point_names_the_function():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["peerlm"].partition(":")
    assert getattr(importlib.import_module(module), name) is vllm_plugin.register
