"""A model with an adapter of peft, from the adapter's folder."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from peerlm.errors import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""Files of an adapter's folder."""


@contextmanager
def without_deprecations() -> Iterator[None]:
    """Within this context nobody is warned that peft uses a name which transformers is about to drop."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def base_of_adapter(path: str | Path) -> Path | None:
    """The folder of the model that an adapter was trained on; None where the path is no folder of an adapter.

    Raises:
        UserError: the folder does not say, or there is no such folder.
    """
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        return None
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder / CONFIG} is damaged ({error}); save the adapter again") from error
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not base or not Path(base).is_dir():
        raise UserError(
            f"{folder} is an adapter of the model {base!r}, which is no folder here: write its folder as "
            f"base_model_name_or_path into {CONFIG}"
        )
    return Path(base)


def put_adapter(model: PreTrainedModel, folder: str | Path, *, trained: bool = False) -> PreTrainedModel:
    """A model with the adapter of a folder, in evaluation mode.

    Args:
        model: the adapter's base; it is changed.
        folder: as peft writes it, with safetensors.
        trained: whether the adapter is to be trained further; peft's model is returned then, which saves the adapter.

    Raises:
        UserError: peft is missing; the folder has no weights, or the adapter does not fit the model.
    """
    try:
        from peft import PeftModel

        from peerlm.adapters import config  # noqa: F401, makes retrieved adapters known
    except ImportError as error:
        raise UserError(f'{folder} is an adapter, which needs peft: pip install "peerlm[peft]"') from error
    if not (Path(folder) / WEIGHTS).is_file():
        raise UserError(f"{folder} has no {WEIGHTS}: save the adapter again, with safetensors")
    try:
        with without_deprecations():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            found: Any = PeftModel.from_pretrained(model, str(folder), is_trainable=trained)
    except (RuntimeError, TypeError, ValueError, KeyError, UserWarning) as error:
        raise UserError(f"the adapter {folder} does not fit the model: {' '.join(str(error).split())[:300]}") from error
    found = found.to(model.device).eval()
    return cast(PreTrainedModel, found if trained else found.get_base_model())
