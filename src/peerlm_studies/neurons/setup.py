"""What studies of retrieved neurons start from: a dense model, its text, and its layers with learned indices."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TaskID
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from peerlm.convert.neurons.fit import collect_inputs
from peerlm.convert.neurons.index import fit_index
from peerlm.convert.neurons.layer import NeuronLayer, neuron_layer
from peerlm.convert.neurons.weights import neurons_of
from peerlm.data import TokenShards, TokenWindows, window_order
from peerlm.data.manifest import file_sha256
from peerlm.errors import UserError
from peerlm.evaluate import load_model
from peerlm.evaluate.held_out import Windows
from peerlm.evaluate.likelihood import check_context
from peerlm.evaluate.loading import default_context, model_folder
from peerlm.evaluate.windows import text_windows
from peerlm.layers import DenseFFW
from peerlm.marks import Marks, marks_of

HELD_OUT_PART = 5
"""Of text files, one window in so many is held out: the last ones."""
WINDOWS_PER_PASS = 8


@dataclass(frozen=True, kw_only=True)
class NeuronSetup:
    """A dense model, and text to learn its index from and to measure it on."""

    model: PreTrainedModel
    """On its device, in evaluation mode."""
    layers: dict[str, DenseFFW]
    """Its dense feed-forward layers by their path."""
    train: Windows
    """Windows to learn from."""
    heldout: Windows
    """Windows to measure on."""
    context: int
    """Tokens of a window."""
    identity: dict[str, Any]
    """What rows depend on: digests of model and text."""


def load_setup(
    run: str | Path, *, text: Sequence[str | Path] = (), data: str | Path | None = None, settings: Mapping[str, Any]
) -> NeuronSetup:
    """Read a model and its text.

    Args:
        run: a run, or a folder of a saved model, of our own architecture.
        text: text, JSONL or parquet files; the last fifth of their windows is held out.
        data: or a prepared folder, with its own held-out split.
        settings: of `NeuronLayer`; wrong ones are found here, before anything is measured.

    Raises:
        UserError: no model, no dense layers in it, no text or too little, both or neither of text and data, or a
            setting that no layer has.
    """
    if bool(text) == (data is not None):
        raise UserError("name text files or one prepared folder: exactly one of --text and --data")
    model, tokenizer = load_model(run)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, DenseFFW)}
    if not layers:
        raise UserError(
            f"{run} has no dense feed-forward layers of peerlm's own, whose neurons could be retrieved; name a run "
            'that was trained with model.ffw_layers = "dense"'
        )
    try:
        for layer in layers.values():
            neuron_layer(neurons_of(layer), settings)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    context = default_context(run, model)
    check_context(model, context)
    train: Windows
    heldout: Windows
    if data is not None:
        train, heldout = (TokenWindows(TokenShards(data, split), context) for split in ("train", "heldout"))
        if train.shards.vocab_size > model.config.vocab_size:
            raise UserError(
                f"{data} has tokens up to {train.shards.vocab_size}, but the model knows {model.config.vocab_size}; "
                "name the folder that the model was trained on, or text files"
            )
        text_digest = file_sha256(Path(data) / "manifest.json")
    else:
        train, heldout = _text_windows(tokenizer, text, context, marks_of(model, tokenizer))
        text_digest = " ".join(file_sha256(Path(file)) for file in text)
    weights = sorted(model_folder(run).glob("*.safetensors"))
    identity = {
        "model": [file_sha256(path) for path in weights],
        "text": text_digest,
        "context": context,
    }
    return NeuronSetup(model=model, layers=layers, train=train, heldout=heldout, context=context, identity=identity)


def _text_windows(
    tokenizer: PreTrainedTokenizerFast, files: Sequence[str | Path], context: int, marks: Marks
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    windows = list(text_windows(tokenizer, files, context, marks))
    if len(windows) < HELD_OUT_PART:
        raise UserError(
            f"the text has {len(windows)} windows of {context} tokens, less than {HELD_OUT_PART}: name more text"
        )
    cut = len(windows) - len(windows) // HELD_OUT_PART
    return windows[:cut], windows[cut:]


def key_of(setup: NeuronSetup, **values: Any) -> str:
    """Digest of all that a row depends on; a row with this key need not be made again."""
    return hashlib.sha256(json.dumps(setup.identity | values, sort_keys=True).encode()).hexdigest()[:16]


def draw_windows(windows: Windows, number: int, *, seed: int, start: int = 0) -> Tensor:
    """Windows `start` up to `start + number` of an endless order without repetition in an epoch: (number, context)."""
    places = (divmod(place, len(windows)) for place in range(start, start + number))
    return torch.stack([windows[window_order(index, len(windows), seed, epoch)] for epoch, index in places])


def layer_inputs(setup: NeuronSetup, input_ids: Tensor) -> dict[str, Tensor]:
    """What each dense layer of the model reads on windows (number, context): (tokens, dim) by path."""
    samples = ({"input_ids": batch, "use_cache": False} for batch in input_ids.split(WINDOWS_PER_PASS))
    return collect_inputs(setup.model, setup.layers, samples, max_tokens=input_ids.numel())


def fitted_layers(
    setup: NeuronSetup,
    inputs: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    *,
    steps: int,
    seed: int,
    bar: Progress,
) -> dict[str, NeuronLayer]:
    """A layer of retrieved neurons for each dense one, its index learned from these inputs.

    Raises:
        UserError: an activation or a loss was not finite.
    """
    layers = {}
    for path, dense in setup.layers.items():
        layer = neuron_layer(neurons_of(dense), settings)
        task = bar.add_task(f"index of {path}", total=steps)
        try:
            fit_index(layer, inputs[path], steps=steps, seed=seed, report=partial(_advance, bar, task))
        except (ValueError, FloatingPointError) as error:
            raise UserError(f"the index of {path} cannot be learned: {error}") from error
        layers[path] = layer
    return layers


def _advance(bar: Progress, task: TaskID, done: int, total: int) -> None:
    bar.update(task, completed=done, total=total)


@contextmanager
def replaced(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within this context these modules stand at their paths; on exit those that were there before do again."""
    before = {path: model.get_submodule(path) for path in layers}
    try:
        for path, layer in layers.items():
            model.set_submodule(path, layer)
        yield
    finally:
        for path, layer in before.items():
            model.set_submodule(path, layer)
