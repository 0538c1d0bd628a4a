"""The mask of real tokens, for layers that their model does not pass it to."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peerlm.convert.hooks import remove_hooks

_CHECKPOINT = "_gradient_checkpointing_func"
"""What transformers calls the function that runs a block under gradient checkpointing."""


class TokenMask:
    """The 2-D attention mask of the forward pass that is under way in one model."""

    def __init__(self) -> None:
        self.attention_mask: Tensor | None = None

    def of(self, x: Tensor) -> Tensor | None:
        """Which of the hidden states x (batch, sequence, dim) or (batch * sequence, dim) are of real tokens, bool.

        With cached keys and values the mask is longer than x, whose tokens are the last. None where the model was not
        given a 2-D mask, or one that does not fit.
        """
        mask = self.attention_mask
        if mask is None:
            return None
        if x.ndim == 3 and mask.shape[0] == x.shape[0] and mask.shape[1] >= x.shape[1]:
            return mask[:, -x.shape[1] :].to(x.device, torch.bool)
        if x.ndim == 2 and mask.numel() == x.shape[0]:
            return mask.reshape(-1).to(x.device, torch.bool)
        return None

    def watch(self, model: PreTrainedModel, paths: list[str]) -> None:
        """Follow the masks that are passed to this model, or to models in it, that hold one of the layers at `paths`.

        Gradient checkpointing runs a block again in the backward pass, after the forward pass is over and perhaps
        after others: there the block's own mask comes back with it.
        """
        above = _modules_above(model, paths)
        for module in above:
            if isinstance(module, PreTrainedModel):
                module.register_forward_pre_hook(_TakeMask(self, module, above), with_kwargs=True)
        model.register_forward_hook(_Forget(self), always_call=True)


class _TakeMask:
    """Notes the mask that a model is called with."""

    def __init__(self, masks: TokenMask, module: nn.Module, above: list[nn.Module]):
        names = list(inspect.signature(module.forward).parameters)
        self.position = names.index("attention_mask") if "attention_mask" in names else None
        self.masks = masks
        self.blocks = above

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.position is not None:
            given = args[self.position] if len(args) > self.position else kwargs.get("attention_mask")
            # A model inside another may be called with a mask that its caller has made 4-D: then the caller's holds.
            if given is None or (isinstance(given, Tensor) and given.ndim == 2):
                self.masks.attention_mask = given
        for block in self.blocks:
            if getattr(block, "gradient_checkpointing", False):
                function = getattr(block, _CHECKPOINT, None)
                if function is not None and not isinstance(function, _CheckpointWithMask):
                    setattr(block, _CHECKPOINT, _CheckpointWithMask(self.masks, function))


class _Forget:
    """Forgets the mask when the outermost model is done, or has failed."""

    def __init__(self, masks: TokenMask):
        self.masks = masks

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.masks.attention_mask = None


class _CheckpointWithMask:
    """Checkpointing of a function that finds, whenever it runs, the mask that it first ran with."""

    def __init__(self, masks: TokenMask, checkpoint: Callable[..., Any]):
        self.masks = masks
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.checkpoint(partial(self._run, function, self.masks.attention_mask), *args)

    def _run(self, function: Callable[..., Any], mask: Tensor | None, *args: Any) -> Any:
        before, self.masks.attention_mask = self.masks.attention_mask, mask
        try:
            return function(*args)
        finally:
            self.masks.attention_mask = before


def stop_watching(model: nn.Module) -> None:
    """Undo `TokenMask.watch`."""
    for module in model.modules():
        remove_hooks(module, (_TakeMask, _Forget))
        function = getattr(module, _CHECKPOINT, None)
        if isinstance(function, _CheckpointWithMask):
            setattr(module, _CHECKPOINT, function.checkpoint)


def _modules_above(model: nn.Module, paths: list[str]) -> list[nn.Module]:
    """The model, and the modules on the way to these paths, each once."""
    names = {""}
    for path in paths:
        parts = path.split(".")
        names |= {".".join(parts[:depth]) for depth in range(1, len(parts))}
    return [module for name, module in model.named_modules() if name in names]
