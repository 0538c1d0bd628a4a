"""peft's tests of custom and of decoder models, with our adapters, and with its own on a model of ours.

The modules of tests are loaded as they are, but for their lists of cases, in whose place ours stand.
"""

import ast
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig
from transformers import LlamaConfig, LlamaForCausalLM

from peerlm.data.tokenizer import train_tokenizer
from peerlm.hf import PeerAdapterConfig, PeerConfig, PeerForCausalLM

SMALL = {"num_experts": 16, "heads": 2, "experts_per_head": 2, "key_dim": 4}
MODELS = Path(os.environ["PEERLM_FOREIGN"]) / "models"


def save_models() -> list[str]:
    """A tiny Llama and a tiny model of ours with a tokenizer each; their folders, seen from where the tests run."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["the cat sat on the mat and saw a bird"] * 4, vocab_size=280)
    sizes = {"vocab_size": 280, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    for name, model in (
        ("llama", LlamaForCausalLM(LlamaConfig(**sizes, **special, intermediate_size=64))),
        ("peer", PeerForCausalLM(PeerConfig(**sizes, **special, peer={**SMALL, "key_dim": 16}))),
    ):
        model.save_pretrained(MODELS / name)
        tokenizer.save_pretrained(MODELS / name)
    return [os.path.relpath(MODELS / name) for name in ("llama", "peer")]


def load_tests(name: str, **lists: Any) -> ModuleType:
    """A module of tests whose variables of these names are these lists."""
    path = Path("tests") / f"{name}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    replaced = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in lists:
            replaced.add(node.targets[0].id)
            node.value = ast.parse(f"_ours[{node.targets[0].id!r}]", mode="eval").body
    if replaced != set(lists):
        raise ValueError(f"{path} has no list {', '.join(set(lists) - replaced)}; peft has changed its tests")
    module: Any = ModuleType(f"tests.{name}")
    module.__file__, module.__package__, module._ours = str(path.resolve()), "tests", lists
    sys.modules[module.__name__] = module
    exec(compile(ast.fix_missing_locations(tree), path, "exec"), vars(module))
    return module


try:
    import diffusers  # noqa: F401
except ModuleNotFoundError:  # which the tests ask whether a model is a pipeline of
    sys.modules["diffusers"] = ModuleType("diffusers")
    sys.modules["diffusers"].StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]

import tests.testing_utils  # noqa: E402, it imports diffusers

# This would go online for the first test of each model.
tests.testing_utils.hub_online_once = lambda model_id: nullcontext()

_LANGUAGE = {"task_type": "CAUSAL_LM"}
_decoders = load_tests(
    "test_decoder_models",
    PEFT_DECODER_MODELS_TO_TEST=(models := save_models()),
    SMALL_GRID_MODELS=models,
    ALL_CONFIGS=[
        (PeerAdapterConfig, {**_LANGUAGE, **SMALL}),
        (
            PeerAdapterConfig,
            {**_LANGUAGE, **SMALL, "target_modules": "all-linear", "rank": 2, "query_norm": "batch"},
        ),
        (LoraConfig, {**_LANGUAGE, "target_modules": ["q_proj", "query_proj", "down_proj"]}),
        (LoraConfig, {**_LANGUAGE, "use_dora": True}),
        (IA3Config, {**_LANGUAGE, "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
        (PromptTuningConfig, {**_LANGUAGE, "num_virtual_tokens": 4}),
        (PrefixTuningConfig, {**_LANGUAGE, "num_virtual_tokens": 4}),
    ],
)
_first, _second = ({**SMALL, "target_modules": [name], "init_weights": False} for name in ("lin0", "lin1"))
_custom = load_tests(
    "test_custom_models",
    TEST_CASES=[
        (f"PEER {number}", model, PeerAdapterConfig, {**SMALL, **settings})
        for number, (model, settings) in enumerate(
            [
                ("MLP", {"target_modules": "lin0"}),
                ("MLP", {"target_modules": ["lin0", "lin1"]}),
                ("MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
                ("MLP", {"target_modules": ["lin0"], "rank": 3, "activation": "gelu", "query_norm": "batch"}),
                ("EmbConv1D", {"target_modules": ["conv1d"]}),
            ]
        )
    ],
    MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES=[
        ("PEER same", "peer_adapter", PeerAdapterConfig, _first, _first),
        ("PEER different", "peer_adapter", PeerAdapterConfig, _first, _second),
    ],
    MIXED_ADAPTER_TEST_CASES=[
        ("PEER mixed", PeerAdapterConfig(**_first), PeerAdapterConfig(**(_first | {"num_experts": 25}))),
    ],
)

TestDecoderModels = _decoders.TestDecoderModels
TestPeftCustomModel = _custom.TestPeftCustomModel
TestMultipleActiveAdapters = _custom.TestMultipleActiveAdapters
TestMixedAdapterBatches = _custom.TestMixedAdapterBatches
