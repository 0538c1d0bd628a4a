"""Whether vLLM writes the tokens that `generate` writes, for several prompts and kinds of models, in float32.

Run by `run.py` in its environment. Greedy text of all prompts in one batch is compared with that of each alone.
"""

# ruff: noqa: T201, what it prints is what this is for

import gc
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

from peerlm.convert import convert
from peerlm.model import PeerConfig, PeerForCausalLM

VOCABULARY = 512
TOKENS = 24
EXPERTS = {"num_experts": 256, "heads": 2, "experts_per_head": 8, "key_dim": 16}
MIXTURE = {"num_experts": 4, "hidden": 64}
LENGTHS = (1, 2, 5, 17, 40, 64, 90, 130)
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}


def ours(**changes: Any) -> PeerForCausalLM:
    """A model of ours whose random weights write varied text; what is saved beside weights is not as at the start."""
    model = PeerForCausalLM(PeerConfig(**SIZES, tie_word_embeddings=False, **changes))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(4)
        model.lm_head.weight.mul_(4)
        weights = dict(model.named_parameters())
        for name, tensor in model.state_dict().items():
            if name not in weights and tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return model


MODELS = {
    "dense": lambda: ours(ffw_layers="swiglu"),
    "PEER": lambda: ours(ffw_layers=["dense", "peer", "swiglu"], peer=EXPERTS),
    "dense beside PEER": lambda: ours(ffw_layers=["dense+peer", "peer", "swiglu+peer"], peer=EXPERTS),
    "options of attention": lambda: ours(ffw_layers="peer", peer=EXPERTS, qk_norm=True, num_key_value_heads=2),
    "output gates": lambda: ours(ffw_layers="peer", peer=EXPERTS, ffw_output_gate="feature"),
    "an output gate per token": lambda: ours(ffw_layers="dense", ffw_output_gate="token"),
    "shared tables": lambda: ours(ffw_layers="peer", peer=EXPERTS, share_tables=True),
    "memory and mixtures": lambda: ours(
        ffw_layers=["pkm", "token_choice", "fine_grained_moe"],
        pkm={"num_values": 256, "heads": 2, "values_per_head": 8, "key_dim": 16},
        token_choice=MIXTURE,
    ),
}


def compare(folder: Path) -> tuple[int, int]:
    """How many of the prompts are continued as by `generate`, and how many different tokens there were."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = []
    for prompt in prompts:
        with torch.no_grad():
            written = model.generate(
                torch.tensor([prompt]), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0
            )
        expected.append(written[0, len(prompt) :].tolist())
    del model
    engine = LLM(
        str(folder), skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=8
    )
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True, detokenize=False)
    outputs = engine.generate([TokensPrompt(prompt_token_ids=each) for each in prompts], sampling, use_tqdm=False)
    found = [list(output.outputs[0].token_ids) for output in outputs]
    del engine
    gc.collect()
    same = sum(a == b for a, b in zip(found, expected, strict=True))
    return same, len({token for text in expected for token in text})


def refused() -> bool:
    """Whether vLLM refuses a converted Llama, which it would serve without its experts, and says what to do."""
    model = convert(LlamaForCausalLM(LlamaConfig(**SIZES)), layers="middle", **EXPERTS)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        try:
            LLM(folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=256)
        except ValueError as error:
            return "use `peerlm serve`" in str(error)
    return False


def main() -> int:
    """All models, or those that are named; 1 where one differs."""
    wrong = 0
    for name in sys.argv[1:] or MODELS:
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            MODELS[name]().save_pretrained(folder)
            same, different = compare(Path(folder))
        print(f"{name}: {same} of {len(LENGTHS)} texts are those of generate, with {different} different tokens")
        wrong += same < len(LENGTHS)
    if not sys.argv[1:]:
        known = refused()
        print(f"a converted Llama is {'refused, as it should be' if known else 'NOT refused'}")
        wrong += not known
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
