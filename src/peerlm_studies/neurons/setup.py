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

from peerlm.convert.ffws import find_ffws
from peerlm.convert.insertion import FFWSite, check_replaceable, put_back, put_in_place, replaced_modules
from peerlm.convert.neurons.fit import collect_inputs
from peerlm.convert.neurons.index import fit_index
from peerlm.convert.neurons.layer import NeuronLayer, neuron_layer
from peerlm.convert.neurons.weights import Neurons
from peerlm.convert.record import conversion_of
from peerlm.data import TokenShards, TokenWindows, window_order
from peerlm.data.manifest import file_sha256
from peerlm.errors import UserError
from peerlm.evaluate import load_model
from peerlm.evaluate.held_out import Windows
from peerlm.evaluate.likelihood import check_context
from peerlm.evaluate.loading import default_context, model_folder
from peerlm.evaluate.windows import text_windows
from peerlm.marks import Marks, marks_of

HELD_OUT_PART = 5
"""Of text files, one window in so many is held out: the last ones."""
WINDOWS_PER_PASS = 8


@dataclass(frozen=True, kw_only=True)
class NeuronSetup:
    """A dense model, and text to learn its index from and to measure it on."""

    model: PreTrainedModel
    """On its device, in evaluation mode."""
    layers: dict[str, Neurons]
    """The neurons of its dense feed-forward layers by the layers' paths; views of its weights."""
    sites: dict[str, FFWSite]
    """Where these layers stand."""
    readers: dict[str, str]
    """The path of the map in each layer that reads first: what it reads is the layer's input."""
    train: Windows
    """Windows to learn from."""
    heldout: Windows
    """Windows to measure on."""
    context: int
    """Tokens of a window."""
    identity: dict[str, Any]
    """What rows depend on: digests of model and text."""


def load_setup(
    run: str | Path,
    *,
    text: Sequence[str | Path] = (),
    data: str | Path | None = None,
    settings: Mapping[str, Any],
    context: int | None = None,
) -> NeuronSetup:
    """Read a model and its text.

    Args:
        run: a run, or a folder of any causal language model of transformers with dense feed-forward layers.
        text: text, JSONL or parquet files; the last fifth of their windows is held out.
        data: or a prepared folder, with its own held-out split.
        settings: of `NeuronLayer`; wrong ones are found here, before anything is measured.
        context: tokens of a window; default: as trained.

    Raises:
        UserError: no model, no dense layers in it or some that cannot be replaced, no text or too little, both or
            neither of text and data, or a setting that no layer has.
    """
    if bool(text) == (data is not None):
        raise UserError("name text files or one prepared folder: exactly one of --text and --data")
    model, tokenizer = load_model(run)
    if conversion_of(model) is not None:
        raise UserError(f"{run} is converted; name the model that it was made from, whose layers are all dense")
    try:
        ffws = find_ffws(model)
        sites = {ffw.path: FFWSite.of(ffw) for ffw in ffws}
        for site in sites.values():
            check_replaceable(site)
        layers = {ffw.path: ffw.neurons() for ffw in ffws}
        for neurons in layers.values():
            neuron_layer(neurons, settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"the neurons of {run} cannot be retrieved: {error}") from error
    context = default_context(run, model) if context is None else context
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
    return NeuronSetup(
        model=model,
        layers=layers,
        sites=sites,
        readers={ffw.path: ffw.down.path for ffw in ffws},
        train=train,
        heldout=heldout,
        context=context,
        identity=identity,
    )


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
    readers = {path: setup.model.get_submodule(reader) for path, reader in setup.readers.items()}
    return collect_inputs(setup.model, readers, samples, max_tokens=input_ids.numel())


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
    for path, neurons in setup.layers.items():
        layer = neuron_layer(neurons, settings)
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
def replaced(setup: NeuronSetup, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within this context these layers stand in place of the model's own at their paths; on exit those do again."""
    before = replaced_modules(setup.model, [setup.sites[path] for path in layers])
    try:
        put_in_place(setup.model, {setup.sites[path]: layer for path, layer in layers.items()})
        yield
    finally:
        put_back(setup.model, before)
