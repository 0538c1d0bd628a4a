"""Convert a saved model to another folder."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from peerlm.errors import UserError
from peerlm.files import atomic_folder
from peerlm.surgery.convert import convert, unconvert
from peerlm.surgery.record import conversion_of

_COMPANIONS = (
    "added_tokens.json",
    "chat_template*",
    "merges.txt",
    "*preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "*.model",
    "tokenizer*",
    "vocab*",
)
"""Files beside a model that a conversion leaves as they are: its tokenizer, or what prepares its images."""


def convert_folder(
    source: Path,
    output: Path,
    *,
    mode: str = "beside",
    layers: str | Sequence[int] | None = None,
    init: str = "random",
    settings: dict[str, Any] | None = None,
    samples: Iterable[Mapping[str, Any]] | None = None,
    undo: bool = False,
    seed: int = 0,
    report: Callable[[str, int, int], object] | None = None,
) -> dict[str, Any]:
    """Load a model that `save_pretrained` wrote, convert it (or with `undo` unconvert it), and save it.

    Args:
        source: its folder; the class that its configuration names is loaded.
        output: the folder to write, whole or not at all; the tokenizer is copied.
        mode, layers, init, settings, samples: as `convert` takes them.
        undo: call `unconvert`, and nothing else.
        seed: of the new weights.
        report: as of `fit_neurons`.

    Returns:
        "layers" (paths of the feed-forward layers), "mode", "init", "parameters_before", "parameters_after".

    Raises:
        UserError: the output exists, the model cannot be read, or `convert` refuses it.
    """
    if output.exists():
        raise UserError(f"{output} exists already; name a new folder")
    check_seed(seed)
    model = load_saved(source)
    before = count_parameters(model)
    torch.manual_seed(seed)
    try:
        if undo:
            record = conversion_of(model)
            unconvert(model)
        else:
            fit = {"seed": seed, "report": report}
            convert(model, mode=mode, layers=layers, init=init, samples=samples, fit=fit, **(settings or {}))
            record = conversion_of(model)
    except (ValueError, TypeError, FloatingPointError, RuntimeError, MemoryError) as error:  # torch's for memory too
        raise UserError(f"cannot convert {source}: {error}") from error
    assert record is not None  # unconvert refuses a model without one
    save_changed(model, source, output)
    return {
        "layers": [site.path for site in record.read_sites()],
        "mode": record.mode,
        "init": record.init,
        "parameters_before": before,
        "parameters_after": count_parameters(model),
    }


def check_seed(seed: int) -> None:
    """Raise a UserError where torch takes no such seed."""
    if not -(2**63) <= seed < 2**64:
        raise UserError(f"seed is {seed}; it must fit into 64 bits")


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Within this context what goes wrong is put down to the saved model in a folder, in one UserError."""
    try:
        yield
    except UserError:
        raise
    except (SafetensorError, StrictDataclassError, OSError, ValueError, RuntimeError) as error:
        detail = " ".join(str(error).split())
        raise UserError(f"{folder} holds no model that can be read ({detail}); restore it") from error


def load_saved(folder: Path) -> PreTrainedModel:
    """The model that `save_pretrained` wrote, of the class that its configuration names.

    Raises:
        UserError: there is none, or it cannot be read, or has other weights than its configuration says.
    """
    with reading(folder):
        config = AutoConfig.from_pretrained(folder)
        loaded: Any = _class_of(config, folder).from_pretrained(folder, output_loading_info=True)
    model, report = loaded
    for keys, what in ((report["missing_keys"], "lacks"), (report["unexpected_keys"], "has unknown")):
        if keys:
            raise UserError(f"{folder} {what} weights, such as {min(keys)}; restore it")
    return cast("PreTrainedModel", model)


def save_changed(model: PreTrainedModel, source: Path, output: Path) -> None:
    """Write a model that was loaded from `source` to the folder `output`, whole or not at all, with its tokenizer."""
    with atomic_folder(output) as folder:
        model.save_pretrained(folder)
        for path in sorted(source.iterdir()):
            if path.is_file() and any(fnmatch(path.name, pattern) for pattern in _COMPANIONS):
                shutil.copyfile(path, folder / path.name)


def _class_of(config: Any, folder: Path) -> type[PreTrainedModel]:
    """The class that a configuration names, of transformers or registered with its Auto classes."""
    name = (config.architectures or [""])[0]
    registered = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    for candidate in (registered, getattr(transformers, name, None)):
        if isinstance(candidate, type) and candidate.__name__ == name:
            return candidate
    raise UserError(f"{folder} is of the architecture {name!r}, which this version of transformers does not have")


def count_parameters(model: nn.Module) -> int:
    """Parameters of a model, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
