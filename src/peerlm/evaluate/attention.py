"""How much attention later tokens pay the first one, a sink where a head has nothing to say."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peerlm.evaluate.likelihood import device_of
from peerlm.layers.modes import evaluating


def first_token_attention(model: nn.Module, input_ids: Tensor) -> dict[str, float] | None:
    """By block, the share of attention on token 0: the mean over heads and all later tokens of windows (B, L).

    Weights are computed in full for this, a window at a time. None where the model gives none.
    """
    switch: Any = getattr(model, "set_attn_implementation", None)
    config: Any = getattr(model, "config", None)
    if switch is None:
        return None
    before = config._attn_implementation
    switch("eager")  # the others do not return weights
    sums: list[Tensor] = []
    try:
        with evaluating(model), _without_what_transformers_leaves(model):
            for window in input_ids.to(device_of(model)).split(1):
                found = model(input_ids=window, output_attentions=True, use_cache=False).attentions
                if not found or any(each is None for each in found):
                    return None
                paid = torch.stack([weights[:, :, 1:, 0].double().mean() for weights in found])
                sums.append(paid)
    finally:
        switch(before)
    return {str(block): value for block, value in enumerate(torch.stack(sums).mean(0).tolist())}


@contextmanager
def _without_what_transformers_leaves(model: nn.Module) -> Iterator[None]:
    """To give weights, transformers adds forward hooks for good, with which a model can't be pickled: they go again."""
    before = {module: set(module._forward_hooks) for module in model.modules()}
    installed = {module for module in before if _INSTALLED in vars(module)}
    try:
        yield
    finally:
        for module, hooks in before.items():
            for added in set(module._forward_hooks) - hooks:
                del module._forward_hooks[added]
            if _INSTALLED in vars(module) and module not in installed:
                delattr(module, _INSTALLED)


_INSTALLED = "_output_capturing_hooks_installed"
