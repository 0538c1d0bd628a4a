"""Models as `save_pretrained` writes them: read by the class that they name, written to another folder."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedModel

import peerlm.model  # noqa: F401, registers our models with transformers
from peerlm.convert.card import conversion_card
from peerlm.convert.record import conversion_of
from peerlm.errors import UserError
from peerlm.files import atomic_folder
from peerlm.names import SHARDED

_COMPANIONS = (
    "LICENSE*",
    "NOTICE*",
    "added_tokens.json",
    "additional_chat_templates/*",
    "chat_template*",
    "merges.txt",
    "*preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "*.model",
    "tokenizer*",
    "vocab*",
)
"""Files beside a model that a change of it leaves as they are: its tokenizer, what prepares its images, its licence."""


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Within this context what goes wrong is put down to the saved model in a folder, in one UserError."""
    try:
        yield
    except UserError:
        raise
    except (SafetensorError, StrictDataclassError, OSError, ValueError, RuntimeError) as error:
        if (folder / SHARDED).is_file():
            raise UserError(
                f"{folder} is a checkpoint in shards, which peerlm eval and generate read alone: resume its run to the "
                "end, whose model/ everything reads"
            ) from error
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
    check_weights(folder, report)
    return cast("PreTrainedModel", model)


def check_weights(folder: Path, report: Mapping[str, Any]) -> None:
    """Raise UserError where a folder has other weights than its configuration says.

    Args:
        folder: as it was given.
        report: what `from_pretrained` returns with `output_loading_info`.
    """
    for keys, what in ((report["missing_keys"], "lacks"), (report["unexpected_keys"], "has unknown")):
        if keys:
            raise UserError(f"{folder} {what} weights, such as {min(keys)}; restore it")


def save_changed(
    model: PreTrainedModel,
    source: Path,
    output: Path,
    *,
    measured: Mapping[str, Any] | None = None,
    write: Callable[[Path], object] | None = None,
) -> None:
    """Write a model that was loaded from `source` to the folder `output`, whole or not at all, with its tokenizer.

    A converted model gets a card, with the licence and the languages of the card in `source`, and with what was
    `measured` (`peerlm.convert.card`). `write` takes the place of the model's `save_pretrained`.
    """
    record = conversion_of(model)
    with atomic_folder(output) as folder:
        (write or model.save_pretrained)(folder)
        if record is not None:
            card = conversion_card(model, record, name=output.name, source=source, measured=measured or {})
            card.save(folder / "README.md")
        for path in sorted(path for pattern in _COMPANIONS for path in source.glob(pattern)):
            if path.is_file():
                copy = folder / path.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)


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
