"""The widths of a module that maps hidden states to hidden states."""

from torch import nn
from transformers.pytorch_utils import Conv1D


def features_of(module: nn.Module, module_dim: int | None) -> tuple[int, int]:
    """The widths that a module reads and writes.

    Linear layers know theirs. Others are taken to map `module_dim`, or else their own `dim`, to the same width.

    Raises:
        TypeError: the module does not map hidden states to hidden states.
        ValueError: its width is not known.
    """
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    if isinstance(module, (nn.Embedding, nn.MultiheadAttention, nn.modules.conv._ConvNd, nn.ModuleList, nn.Identity)):
        raise TypeError(
            f"a {type(module).__name__} does not map hidden states (..., dim) to hidden states; name linear or "
            "feed-forward layers in target_modules"
        )
    features = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if all(isinstance(size, int) for size in features):
        return features  # type: ignore[return-value]
    dim = module_dim or getattr(module, "dim", None) or getattr(module, "hidden_size", None)
    if not isinstance(dim, int):
        raise ValueError(
            f"the width of a {type(module).__name__} is not known; set module_dim in the configuration to what it "
            "reads and writes, or name linear layers in target_modules"
        )
    return dim, dim
