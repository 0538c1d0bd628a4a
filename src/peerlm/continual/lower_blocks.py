"""The lower blocks of a model, which nothing trains: computed once for each window, then read from a file."""

import inspect
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peerlm.convert.hooks import remove_hooks
from peerlm.files import PARTIAL

log = logging.getLogger(__name__)

FILE = f"{PARTIAL}lower-blocks"
"""In the folder of a stage; a leftover of it is rubbish."""
_PLAIN = {"input_ids", "labels", "use_cache", "logits_to_keep"}
"""Arguments of a forward pass with which hidden states depend on the tokens alone."""


class LowerBlocks:
    """Remembers what the lowest blocks of a model make of windows of tokens; a pass over known ones skips them.

    A forward pass without a cache, over windows that are all known, skips these blocks; their last one gives what it
    gave when the windows were first read. So bits and gradients are those of the pass without this, up to what the
    composition of a batch changes in products of matrices. Nothing below may be trained, or random.

    Args:
        model: a causal model of transformers. Its blocks below `count` must not change from now on.
        count: blocks from the bottom.
        folder: for the file, of `windows` * tokens * hidden size numbers, which `detach` removes.
        windows: how many are remembered at the most; others are computed each time.
    """

    def __init__(self, model: PreTrainedModel, count: int, folder: Path, windows: int):
        self.blocks = _blocks(model)[1][:count]
        self.path = folder / FILE
        self.windows = windows
        self.places: dict[bytes, int] = {}
        self.outputs: Tensor | None = None
        self.keys: list[bytes] = []
        self.skipping = False

    def before(self, given: dict[str, Any]) -> None:
        """A forward pass begins."""
        ids = given.get("input_ids")
        plain = (
            all(value is None or name in _PLAIN for name, value in given.items()) and given.get("use_cache") is False
        )
        self.keys = [row.numpy().tobytes() for row in ids.cpu()] if plain and isinstance(ids, Tensor) else []
        if not self.keys:
            return
        self.skipping = all(key in self.places for key in self.keys)
        if self.skipping:
            for block in self.blocks[:-1]:
                block.forward = _same
            self.blocks[-1].forward = self._known
        else:
            self.blocks[-1].register_forward_hook(_Store(self))

    def after(self) -> None:
        """It has ended, or failed."""
        for block in self.blocks:
            vars(block).pop("forward", None)
        remove_hooks(self.blocks[-1], _Store)
        self.keys, self.skipping = [], False

    def _known(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert self.outputs is not None
        places = torch.tensor([self.places[key] for key in self.keys])
        return self.outputs[places].to(hidden_states.device)

    def store(self, output_BTD: Any) -> None:
        """What the last of the blocks has written."""
        if not isinstance(output_BTD, Tensor) or output_BTD.shape[0] != len(self.keys):
            return
        if self.outputs is None and not self._open(output_BTD):
            return
        assert self.outputs is not None
        for key, row_TD in zip(self.keys, output_BTD.detach(), strict=True):
            if key not in self.places and len(self.places) < self.windows and row_TD.shape == self.outputs.shape[1:]:
                self.places[key] = len(self.places)
                self.outputs[self.places[key]] = row_TD.cpu()

    def _open(self, output_BTD: Tensor) -> bool:
        shape = (self.windows, *output_BTD.shape[1:])
        size = output_BTD[0].numel() * self.windows
        bytes_needed = size * output_BTD.element_size()
        if shutil.disk_usage(self.path.parent).free < 1.2 * bytes_needed:
            log.warning(
                "the disk of %s has no room for %.1f GB: the lower blocks are computed in each epoch, which is slower",
                self.path.parent,
                bytes_needed / 1e9,
            )
            self.windows = 0
            return False
        flat = torch.from_file(str(self.path), shared=True, size=size, dtype=output_BTD.dtype)
        self.outputs = flat.view(shape)
        return True


class _Before:
    def __init__(self, lower: LowerBlocks, names: list[str]):
        self.lower, self.names = lower, names

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.lower.before(dict(zip(self.names, args, strict=False)) | kwargs)


class _After:
    def __init__(self, lower: LowerBlocks):
        self.lower = lower

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.lower.after()


class _Store:
    def __init__(self, lower: LowerBlocks):
        self.lower = lower

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.lower.store(output)


def _same(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def remember_lower_blocks(model: PreTrainedModel, count: int, folder: Path, windows: int) -> None:
    """Let forward passes of a model spare its lowest `count` blocks where they can; see `LowerBlocks`."""
    lower = LowerBlocks(model, count, folder, windows)
    names = list(inspect.signature(model.forward).parameters)
    model.register_forward_pre_hook(_Before(lower, names), with_kwargs=True)
    model.register_forward_hook(_After(lower), always_call=True)


def forget_lower_blocks(model: nn.Module) -> None:
    """Undo `remember_lower_blocks`, and remove its file."""
    for hook in model._forward_hooks.values():
        if isinstance(hook, _After):
            hook.lower.path.unlink(missing_ok=True)
    remove_hooks(model, (_Before, _After))


def lower_blocks_of(model: PreTrainedModel, paths: Sequence[str]) -> int:
    """How many blocks lie below all modules of these paths; 0 where that is not known."""
    name, _ = _blocks(model)
    places = [path.removeprefix(f"{name}.").partition(".")[0] for path in paths]
    return min((int(place) if place.isdigit() else 0 for place in places), default=0)


def _blocks(model: PreTrainedModel) -> tuple[str, list[nn.Module]]:
    """The path and the items of the list of blocks: the one that is as long as the configuration says."""
    number = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return name, list(module)
    return "", []
