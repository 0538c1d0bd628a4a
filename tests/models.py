"""Small random models of many architectures, and what tests of changed models ask of them."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from peerlm.cli import main
from peerlm.model import PeerConfig, PeerForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
GPT2 = {"vocab_size": 64, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32}
VIT = {"image_size": 8, "patch_size": 4, "num_channels": 3, "num_labels": 16}

# The class, its configuration's class, and what the configuration is.
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", GROUPED),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GROUPED),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GROUPED),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2 | {"bos_token_id": 1, "eos_token_id": 2}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES),
    "opt": ("OPTForCausalLM", "OPTConfig", {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16}),
    "phi": ("PhiForCausalLM", "PhiConfig", SIZES),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", SIZES),
    "bert": ("BertForMaskedLM", "BertConfig", SIZES),
    "vit": ("ViTForImageClassification", "ViTConfig", SIZES | VIT),
    "peer": ("PeerForCausalLM", "PeerConfig", {**SIZES, "ffw_layers": "dense"}),
    "peer_swiglu": ("PeerForCausalLM", "PeerConfig", {**SIZES, "ffw_layers": "swiglu"}),
}
MIXTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GROUPED, **EXPERTS, "num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**GROUPED, **EXPERTS, "num_experts": 4}),
    "expert_choice": (
        "PeerForCausalLM",
        "PeerConfig",
        {**SIZES, "ffw_layers": "expert_choice", "expert_choice": {"num_experts": 4, "hidden": 8}},
    ),
}
PEER_SETTINGS: dict[str, Any] = {"num_experts": 64, "heads": 2, "experts_per_head": 4, "key_dim": 8}

Build = Callable[..., PreTrainedModel]


def build(name: str, **changes: Any) -> PreTrainedModel:
    """A new model in evaluation mode, with weights large enough that layers do something, and biases."""
    model_class, config_class, settings = (ARCHITECTURES | MIXTURES)[name]
    own = {"PeerConfig": PeerConfig, "PeerForCausalLM": PeerForCausalLM}
    config = (own.get(config_class) or getattr(transformers, config_class))(**(settings | changes))
    torch.manual_seed(0)
    model: PreTrainedModel = (own.get(model_class) or getattr(transformers, model_class))(config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
                module.weight.normal_(std=0.3)
                if module.bias is not None:
                    module.bias.normal_(std=0.3)
    model.tie_weights()
    return model.eval()


def batch(model: PreTrainedModel, *, seed: int = 0, masked: bool = False) -> dict[str, Tensor]:
    """Inputs of a forward pass; of sequences, the first is padded at its start if asked for."""
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.rand(2, 3, 8, 8, generator=generator).to(model.dtype)}
    ids = torch.randint(3, 64, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    if masked:
        mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def run(*arguments: object) -> int:
    """Run the command `peerlm`; its exit code."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def contents(folder: Path) -> dict[str, str]:
    """Digests of all files below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def assert_refused(named: str, folder: Path, capfd: pytest.CaptureFixture[str], *arguments: object) -> None:
    """The command ends with one sentence that has these words; all below the folder stays, and `new` is not made."""
    before = contents(folder)
    capfd.readouterr()
    assert run(*arguments) == 2
    stderr = capfd.readouterr().err
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, stderr
    assert stderr.splitlines()[-1] == errors[0]
    assert named in errors[0]
    assert "Traceback" not in stderr
    assert contents(folder) == before
    assert not (folder / "new").exists()
