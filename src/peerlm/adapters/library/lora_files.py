"""LoRA adapters as peft saves them, read without peft and never unpickled."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from peerlm.errors import UserError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What changes what an adapter computes, and the value at which it does not.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, []),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    # Others change the base model's weights too when training begins.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """What a LoRA adds to one linear layer: y += scale * x down^T up^T."""

    down: Tensor
    """A, (rank, in_features)."""
    up: Tensor
    """B times the adapter's scale, (out_features, rank)."""

    @property
    def num_bytes(self) -> int:
        """Of both."""
        return self.down.nbytes + self.up.nbytes


LoraWeights = dict[str, LowRank]
"""By the path of the module in the base model."""


def read_lora(folder: Path) -> LoraWeights:
    """The weights of the LoRA in a folder, on the CPU, in the dtype that they have there.

    Ranks and alphas may differ between modules (`rank_pattern`, `alpha_pattern`), and may be rank-stabilised
    (`use_rslora`).

    Raises:
        UserError: there is no such adapter, it is damaged or pickled, or is more than low-rank terms of linear layers.
    """
    config = _read_config(folder)
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        pickled = ", only a pickled one, which is not opened" if (folder / "adapter_model.bin").exists() else ""
        raise UserError(f"{folder} has no {WEIGHTS_NAME}{pickled}; save the adapter with safe_serialization=True")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it") from error
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])\.weight", key)
        if match is None or tensor.ndim != 2:
            raise UserError(
                f"{path} has {key!r}, which is no low-rank term of a linear layer; a library takes plain LoRA alone"
            )
        found.setdefault(match[1], {})[match[2]] = tensor
    for module, pair in found.items():
        if len(pair) < 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            raise UserError(f"{path}: lora_A and lora_B of {module} do not fit together; restore it")
    if not found:
        raise UserError(f"{path} is empty; save the adapter again")
    return {
        module: LowRank(down=pair["A"], up=pair["B"] * _scale(config, module, pair["A"].shape[0]))
        for module, pair in found.items()
    }


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no adapter folder: {path} cannot be read ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise UserError(f"{path} has peft_type {kind!r}; a library takes LORA alone")
    for name, plain in _PLAIN.items():
        if name in config and config[name] not in plain:
            raise UserError(f"{path} has {name} = {config[name]!r}, which a library cannot mix; train without it")
    if not isinstance(config.get("lora_alpha"), (int, float)):
        raise UserError(f"{path} has lora_alpha = {config.get('lora_alpha')!r}; it must be a number")
    return config


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    patterns = config.get("alpha_pattern") or {}
    alpha = next((patterns[p] for p in patterns if re.match(rf"(.*\.)?({p})$", module)), config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
