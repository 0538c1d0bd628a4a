"""What a saved configuration holds so that transformers alone never opens one of our models without its experts.

Where peerlm was imported, transformers reads and writes configurations through `unmarked` and `mark`: it sees a
model's own type, and the marks are in files alone. Elsewhere it meets a `model_type` that it does not know, whose code
is a file of the folder (`auto_map`), and asks for `trust_remote_code=True`. A class that is named, such as
LlamaForCausalLM, ignores the type; it is refused by the name of the file of weights.
"""

import json
from pathlib import Path
from typing import Any

from peerlm.files import write_bytes, write_json
from peerlm.names import CONVERTED, CONVERTED_EARLIER, MODEL_TYPE

CODE = "open_with_peerlm.py"
"""The file of code in a folder."""
PREFIX = "peerlm_"
"""What stands before the type of a converted model, of transformers or ours, in a saved configuration."""

_WEIGHTS = "transformers_weights"
"""The field of a configuration that names a file of weights; transformers shows what cannot be such a name."""
_REFUSAL = 'this model has experts that transformers alone does not know: install peerlm, and "import peerlm" first'
_AUTO_MAP = "auto_map"
_OURS = {"AutoConfig": f"{CODE.removesuffix('.py')}.PeerlmConfig"}
_THEIRS = "auto_map_without_peerlm"
"""The field that keeps the `auto_map` of a converted model that has code of its own."""

_CODE = '''"""Opens this folder's model with peerlm, which knows its PEER experts."""

from transformers import AutoConfig, PreTrainedConfig

try:
    import peerlm.hf
except ModuleNotFoundError as error:
    if error.name != "peerlm":
        raise
    raise ImportError(
        "this model has PEER experts, which transformers alone does not know: install peerlm"
    ) from error


class PeerlmConfig(PreTrainedConfig):
    """Stands for the model\'s own configuration, which transformers reads once peerlm is imported."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **options):
        """The model\'s own configuration."""
        return AutoConfig.from_pretrained(pretrained_model_name_or_path, trust_remote_code=True, **options)
'''


def mark(path: Path) -> None:
    """Mark the configuration in a file, if it is that of a model with PEER, and write the code beside it."""
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    model_type = values.get("model_type", "")
    if _is_converted(values):
        values["model_type"] = PREFIX + model_type
    elif model_type != MODEL_TYPE:
        return
    if _AUTO_MAP in values:
        values[_THEIRS] = values[_AUTO_MAP]
    write_json(path, values | {_AUTO_MAP: _OURS, _WEIGHTS: _REFUSAL})
    write_bytes(path.with_name(CODE), _CODE.encode())


def unmarked(values: dict[str, Any]) -> dict[str, Any]:
    """The configuration that was marked; one without marks as it is. Folders of the first commits have fewer marks."""
    values = dict(values)
    if _is_converted(values):
        values["model_type"] = values.get("model_type", "").removeprefix(PREFIX)
    if values.get(_WEIGHTS) == _REFUSAL:
        del values[_WEIGHTS]
    if values.get(_AUTO_MAP) == _OURS:
        del values[_AUTO_MAP]
    if _THEIRS in values:
        values[_AUTO_MAP] = values.pop(_THEIRS)
    return values


def _is_converted(values: dict[str, Any]) -> bool:
    record = values.get("quantization_config")
    return isinstance(record, dict) and record.get("quant_method") in (CONVERTED, CONVERTED_EARLIER)
