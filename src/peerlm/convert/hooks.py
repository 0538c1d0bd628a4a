"""Take hooks off a module by their kind: a copied model has copies of them, and no handles."""

from collections.abc import Callable
from typing import Any

from torch import nn


def remove_hooks(
    module: nn.Module, kinds: type | tuple[type, ...], which: Callable[[Any], bool] = lambda hook: True
) -> None:
    """Remove the forward hooks and forward pre-hooks of these classes, of them those that `which` says."""
    for hooks, *options in (
        (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called),
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
    ):
        for key in [key for key, hook in hooks.items() if isinstance(hook, kinds) and which(hook)]:
            del hooks[key]
            for option in options:
                option.pop(key, None)
