"""The frozen model that a library adapts: its blocks, its linear layers, and the queries that it makes of tokens."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peerlm.adapters.features import features_of
from peerlm.adapters.library.lora_files import LoraWeights
from peerlm.errors import UserError
from peerlm.layers.modes import evaluating


class _Found(Exception):  # noqa: N818, control flow: the query is known, and the blocks above it need not run
    pass


class BaseModel:
    """What a library has to know of its model.

    Args:
        model: with a list of blocks as long as `config.num_hidden_layers`.

    Attributes:
        blocks: its blocks.
        linear: its linear layers by path.
        reading: whether a query is being made now, for which the model must not be adapted.

    Raises:
        ValueError: the model has no such list.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.blocks = _blocks(model)
        self.linear = {name: each for name, each in model.named_modules() if isinstance(each, (nn.Linear, Conv1D))}
        self.reading = False
        self._argument_names = list(inspect.signature(model.forward).parameters)

    @property
    def dim(self) -> int:
        """Features of a hidden state."""
        return int(self.model.config.get_text_config().hidden_size)

    def arguments(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call of the model by name."""
        return dict(zip(self._argument_names, arguments, strict=False)) | options

    def queries(self, layer: int, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(batch, hidden size) float32: the mean over real tokens after block `layer`, of the model not adapted."""
        hidden: list[Tensor] = []

        def stop(module: nn.Module, arguments: Any, output: Any) -> None:
            hidden.append(hidden_states(output))
            raise _Found

        handle = self.blocks[layer - 1].register_forward_hook(stop)
        reading, self.reading = self.reading, True
        try:
            with evaluating(self.model):
                self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        except _Found:
            pass
        finally:
            handle.remove()
            self.reading = reading
        return mean_of_tokens(hidden[0], attention_mask)

    def check_adapts(self, weights: LoraWeights, folder: Path) -> None:
        """Raise a UserError where the adapter in a folder was not made for this model."""
        for path, term in weights.items():
            if path not in self.linear:
                raise UserError(f"{folder} adapts {path}, which is no linear layer of the model; was it trained on it?")
            expected = features_of(self.linear[path], None)
            if (term.down.shape[1], term.up.shape[0]) != expected:
                raise UserError(
                    f"{folder} adapts {path} from {term.down.shape[1]} to {term.up.shape[0]} features, but the model's "
                    f"has {expected[0]} and {expected[1]}; was it trained on it?"
                )


def hidden_states(output: Any) -> Tensor:
    """The hidden states in a block's output."""
    return output if isinstance(output, Tensor) else output[0]


def mean_of_tokens(hidden_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Mean hidden states (B, D) float32 of the tokens where the mask is not zero."""
    if mask_BT is None:
        return hidden_BTD.float().mean(dim=1)
    real_BT1 = mask_BT[..., None].to(hidden_BTD.device, torch.float32)
    return (hidden_BTD.float() * real_BT1).sum(dim=1) / real_BT1.sum(dim=1).clamp_min(1)


def _blocks(model: PreTrainedModel) -> nn.ModuleList:
    number = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return module
    raise ValueError(
        f"{type(model).__name__} has no list of its {number} blocks; the library does not know where to look"
    )
