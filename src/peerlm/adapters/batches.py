"""Batches whose rows have adapters of their own: peft's `adapter_names=["a", "b", "__base__"]`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from peerlm.adapters.layer import PeerAdapterLayer

BASE = "__base__"
"""The name of no adapter."""


@contextmanager
def adapters_by_row(model: nn.Module, adapter_names: Sequence[str], options: Mapping[str, Any]) -> Iterator[None]:
    """Within this context the adapters in a model, and its `modules_to_save`, are those named for each row.

    Args:
        model: a model with `PeerAdapterLayer`s, in evaluation mode.
        adapter_names: for each row of the batch a name or "__base__".
        options: of the forward pass or of `generate`, which may repeat each row for its beams or sequences.

    Raises:
        ValueError: the model is in training mode, or no layer has an adapter of such a name. Layers raise one where a
            batch has another number of rows.
    """
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode: call model.eval()")
    layers = [each for each in model.modules() if isinstance(each, (PeerAdapterLayer, AuxiliaryTrainingWrapper))]
    known = {name for layer in layers if isinstance(layer, PeerAdapterLayer) for name in layer.peer_adapter_pools}
    unknown = sorted(set(adapter_names) - known - {BASE})
    if unknown:
        raise ValueError(f"adapter_names has {unknown[0]!r}; choose from {', '.join(sorted(known))} and {BASE}")
    repeats = _repeats_of_rows(model, options)

    def pass_names(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        x = args[0] if args else next((value for value in kwargs.values() if isinstance(value, Tensor)), None)
        generated = x is not None and len(x) == repeats * len(adapter_names)
        names = [name for name in adapter_names for _ in range(repeats if generated else 1)]
        return args, {**kwargs, "adapter_names": names}

    hooks = [layer.register_forward_pre_hook(pass_names, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _repeats_of_rows(model: nn.Module, options: Mapping[str, Any]) -> int:
    """How often `generate` with these options repeats each row; an encoder sees them once."""
    sources = (
        options,
        vars(options.get("generation_config", object)),
        vars(getattr(model, "generation_config", object)),
    )

    def setting(name: str) -> int:
        return next((source[name] for source in sources if source.get(name) is not None), 1)

    return max(setting("num_beams"), setting("num_return_sequences"))
