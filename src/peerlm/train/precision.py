"""Training with bfloat16 matrix products: where that is fast, and what else is faster with it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel


def has_bf16_products(device: torch.device) -> bool:
    """Whether a device has instructions for products of bfloat16 matrices; others compute them slowly."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@contextmanager
def attention_by_products(model: nn.Module) -> Iterator[None]:
    """Within this context a model of transformers on a CPU computes attention as products of whole matrices.

    PyTorch's fused attention trains a third as fast there in bfloat16; results differ by rounding. A model
    whose attention is of another kind is left as it is.
    """
    device = next(model.parameters()).device
    found = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    changed = found[0] if found and device.type == "cpu" and found[0].config._attn_implementation == "sdpa" else None
    if changed is not None:
        changed.set_attn_implementation("eager")
    try:
        yield
    finally:
        if changed is not None:
            changed.set_attn_implementation("sdpa")
