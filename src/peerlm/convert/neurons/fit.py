"""Learn the indices of all retrieved neurons in a model, layer by layer, from sample text."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peerlm.convert.neurons.index import IndexFit, fit_index
from peerlm.convert.neurons.layer import NeuronLayer
from peerlm.layers.modes import evaluating


def fit_neurons(
    model: nn.Module,
    samples: Iterable[Mapping[str, Any]],
    *,
    max_tokens: int = 65536,
    steps: int = 300,
    seed: int = 0,
    report: Callable[[str, int, int], object] | None = None,
    learned: Callable[[str, IndexFit], object] | None = None,
) -> dict[str, IndexFit]:
    """Learn each `NeuronLayer`'s index from what it reads while the model reads samples with all neurons at work.

    With all neurons a layer is the dense one that it stands for, so that every index learns from the dense model's
    hidden states. They are collected once and held in memory: max_tokens x width x 4 bytes for each layer.

    Args:
        model: holds the layers, as `convert(model, mode="replace", init="neurons")` puts them; its weights stay.
        samples: keyword arguments of forward passes, such as {"input_ids": (batch, sequence)}; a 2-D attention_mask
            leaves padding out.
        max_tokens: samples are read until each layer has read so many.
        steps, seed: as of `fit_index`.
        report: called with a layer's path, batches done, and all.
        learned: called with a layer's path, and how its index was learned.

    Returns:
        By path, how each index was learned.

    Raises:
        ValueError: no such layers, or no samples.
        FloatingPointError: a loss was not finite.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, NeuronLayer)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no retrieved neurons; convert it with init='neurons' first")
    with _all_at_work(layers.values()):
        inputs = collect_inputs(model, layers, samples, max_tokens=max_tokens)
    fits = {}
    for path, layer in layers.items():
        tell = None if report is None else partial(report, path)
        fits[path] = fit_index(layer, inputs[path], steps=steps, seed=seed, report=tell)
        if learned is not None:
            learned(path, fits[path])
    return fits


def collect_inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], samples: Iterable[Mapping[str, Any]], *, max_tokens: int
) -> dict[str, Tensor]:
    """What these layers of a model read while it reads samples, in evaluation mode: (tokens, dim) float32 on the CPU.

    Raises a ValueError where there are no samples.
    """
    read: dict[str, list[Tensor]] = {path: [] for path in layers}
    device = next(model.parameters()).device
    with ExitStack() as stack:
        for path, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(partial(_keep, read[path])).remove)
        stack.enter_context(evaluating(model))
        for sample in samples:
            if min(sum(map(len, parts)) for parts in read.values()) >= max_tokens:
                break
            model(**{name: _moved(value, device) for name, value in sample.items()})
    if not all(read.values()):
        raise ValueError("there are no samples to learn the index from; pass some arguments of forward passes")
    return {path: torch.cat(parts)[:max_tokens] for path, parts in read.items()}


@contextmanager
def _all_at_work(layers: Iterable[NeuronLayer]) -> Iterator[None]:
    """Within this context every neuron is retrieved, so that a layer is the dense one that it stands for."""
    shares = [(layer, layer.share) for layer in layers]
    try:
        for layer, _ in shares:
            layer.share = 1.0
        yield
    finally:
        for layer, share in shares:
            layer.share = share


def _keep(parts: list[Tensor], layer: nn.Module, arguments: tuple[Any, ...]) -> None:
    x, mask = arguments[0], arguments[1] if len(arguments) > 1 else None
    tokens = x.flatten(0, -2) if mask is None else x[mask]
    parts.append(tokens.to("cpu", torch.float32, copy=True))  # what comes after may write into x


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
