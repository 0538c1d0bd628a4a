"""What a stage changes of a model, as something that `peerlm.train.checkpoint` can save and load."""

from pathlib import Path
from typing import Any

from safetensors.torch import save_model
from torch import nn


class TrainedWeights(nn.Module):
    """The parameters of a model that are trained, and its buffers, by name; the same tensors, not copies."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.register_parameter(_flat(name), parameter)
        for name, buffer in model.named_buffers():
            self.register_buffer(_flat(name), buffer)

    def save_pretrained(self, folder: Path, **options: Any) -> None:
        """Write model.safetensors; options are transformers' and have no meaning here."""
        save_model(self, str(folder / "model.safetensors"))


def _flat(name: str) -> str:
    return name.replace(".", "/")
