"""The model and tokenizer of a run or of a saved model, on the device that evaluates fastest."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from peerlm.convert.saved import check_weights, reading
from peerlm.data.tokenizer import open_tokenizer
from peerlm.errors import UserError
from peerlm.evaluate.adapter import base_of_adapter, put_adapter
from peerlm.layers.mapped.advice import read_rows_alone
from peerlm.layers.mapped.cached import CACHING, cache_tables
from peerlm.model import PeerConfig, PeerForCausalLM
from peerlm.names import MODEL_TYPE, SHARDED
from peerlm.packs.api import load_pack
from peerlm.parallel.states import load_weights
from peerlm.parallel.storage import INDEX
from peerlm.ranks import automatic_device

MAX_DEFAULT_CONTEXT = 2048


def load_model(
    path: str | Path, packs: Sequence[str | Path] = (), *, device_rows: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load a causal language model in evaluation mode, on CUDA where there is one, and its tokenizer.

    Args:
        path: a run (its model/, or else its newest checkpoint), a folder that `save_pretrained` wrote, or that of an
            adapter of peft, whose base has to be a folder too.
        packs: folders of packs (`peerlm.packs.api`) to load into it.
        device_rows: rows of each table that the GPU has places for, while all rows stay on the host
            (`layers.mapped.cached.cache_tables`); 0: tables are moved whole.

    Raises:
        UserError: no such folder, no model or tokenizer in it, damaged, missing or unknown weights, or a tokenizer
            with more tokens than the model knows; a pack that is not the model's; or device_rows without a GPU.
    """
    model: Any
    device = automatic_device()
    if device_rows and device.type not in CACHING:
        raise UserError(
            f"device_rows is {device_rows:,}, but the model runs on {device}, where all rows are: leave it out"
        )
    if (base := base_of_adapter(path)) is not None:
        model, tokenizer = load_model(base, packs, device_rows=device_rows)
        return put_adapter(model, path), tokenizer
    folder = model_folder(path)
    tokenizer = open_tokenizer(folder)
    with reading(folder):
        model = _of_shards(folder) if (folder / INDEX).is_file() else _of_files(folder)
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"the tokenizer of {folder} has {len(tokenizer)} tokens, but its model knows "
            f"{model.config.vocab_size}; restore the tokenizer that the model was trained with"
        )
    try:
        for pack in packs:
            load_pack(model, pack)
        if device_rows:
            read_rows_alone(model)  # of files, which the model's parameters will not be
            cache_tables(model, device, device_rows)
    except ValueError as error:
        raise UserError(str(error)) from error
    model = model.to(device).eval()
    read_rows_alone(model)
    return model, tokenizer


def _of_files(folder: Path) -> PreTrainedModel:
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, report = loaded
    check_weights(folder, report)
    return cast(PreTrainedModel, model)


def _of_shards(folder: Path) -> PreTrainedModel:
    """The model of a checkpoint in shards, whole on this process."""
    config = _read_config(folder, SHARDED)
    if config.get("model_type") != MODEL_TYPE:
        raise UserError(f"{folder} is a checkpoint in shards of a model that peerlm did not make: resume its run")
    model = PeerForCausalLM(PeerConfig.from_dict(config))
    load_weights(model, folder)
    return model


def model_folder(path: str | Path) -> Path:
    """The folder of the saved model that `path` means; raises UserError where there is none."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; name a run or a saved model")
    if _has_model(path):
        return path
    if (base := base_of_adapter(path)) is not None:
        raise UserError(f"{path} is an adapter, and a model is needed here: name its base, {base}")
    checkpoints = sorted((path / "checkpoints").glob("step-*"))
    for folder in [path / "model", *reversed(checkpoints)]:
        if _has_model(folder):
            return folder
    raise UserError(f"{path} is neither a run with a model/ or a checkpoint nor a saved model; name the folder of one")


def trained_context(path: str | Path) -> int | None:
    """Tokens of context that a run was trained with; None where `path` is no run and no model in one."""
    path = Path(path).resolve()
    for folder in (path, *path.parents[:2]):
        data = _read_config(folder).get("data")
        if isinstance(data, dict) and isinstance(data.get("context"), int):
            return int(data["context"])
    return None


def trained_on(path: str | Path) -> Path | None:
    """The data folder that a run was trained on, as its configuration has it; None where `path` is no run."""
    data = _read_config(Path(path)).get("data")
    return Path(data["folder"]) if isinstance(data, dict) and isinstance(data.get("folder"), str) else None


def default_context(path: str | Path, model: PreTrainedModel) -> int:
    """Tokens to read at once: what a run was trained with, else 2,048 or the most that the model reads."""
    return trained_context(path) or min(
        getattr(model.config, "max_position_embeddings", MAX_DEFAULT_CONTEXT), MAX_DEFAULT_CONTEXT
    )


def _has_model(folder: Path) -> bool:
    """Whether a folder has a model, in whole files or in shards."""
    return any("model_type" in _read_config(folder, name) for name in ("config.json", SHARDED))


def _read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """config.json of a folder; empty where there is none or it is not a JSON object."""
    try:
        config = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
