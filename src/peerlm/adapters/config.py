"""Retrieved adapters as a method of peft: `get_peft_model(model, PeerAdapterConfig(...))`.

Importing this module, which `peerlm.registration` does when peft is imported, registers the method under the type
"PEER_ADAPTER". `PeftModel.from_pretrained` and the AutoPeftModel classes can then load such adapters.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

try:
    from peft import PeftConfig
except ImportError as error:
    raise ImportError('retrieved adapters need peft: pip install "peerlm[peft]"') from error

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import CONFIG_NAME, TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, PeftType, register_peft_method
from torch import nn
from transformers.pytorch_utils import Conv1D

from peerlm.adapters.batches import adapters_by_row
from peerlm.adapters.features import features_of
from peerlm.adapters.layer import CANNOT_MERGE, PeerAdapterLayer, PeerAdapterLinear
from peerlm.files import write_json
from peerlm.names import MODEL_TYPE

_NAME = "peer_adapter"
_SAVED_TYPE = f'{_NAME.upper()} of peerlm: install it, and "import peerlm" first'
"""The type in files: where peerlm was not imported, peft raises a KeyError of it."""
_POOL_SETTINGS = (
    "num_experts",
    "heads",
    "experts_per_head",
    "key_dim",
    "rank",
    "activation",
    "shared_keys",
    "query_norm",
    "weighting",
    "weight_scale",
    "dropout",
    "init_weights",
    "backend",
    "row_dim",
)


def _peft_type() -> PeftType:
    """The member of peft's enumeration that stands for this method; peft has no other way in for methods of others."""
    name = _NAME.upper()
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_, member._value_ = name, name
        type.__setattr__(PeftType, name, member)
        PeftType._member_map_[name] = member
        PeftType._member_names_.append(name)
        PeftType._value2member_map_[name] = member
    return PeftType(name)


_PEFT_TYPE = _peft_type()


@dataclass
class PeerAdapterConfig(PeftConfig):
    """An adapter of N low-rank experts beside each target module, retrieved by product keys for every token.

    The settings up to `row_dim` are those of `peerlm.adapters.pool.AdapterPool`, which checks them.

    Queries are normalised by "layer": no mask of padding reaches a linear layer, so that the statistics of "batch"
    would count padding, and batches in fine-tuning are small.
    """

    num_experts: int = 1024
    """N, a square number."""
    heads: int = 4
    """Independent queries per token."""
    experts_per_head: int = 8
    """Experts that each query retrieves; heads * experts_per_head * rank neurons are active per token."""
    key_dim: int = 32
    """Size of a query, even."""
    rank: int = 1
    """Neurons per expert."""
    activation: str = "identity"
    """Of neurons; with "identity" an expert is a LoRA of this rank."""
    shared_keys: bool = False
    """One set of sub-keys for all heads, or one per head."""
    query_norm: str = "layer"
    """ "layer", "batch" or "none"."""
    weighting: str = "softmax"
    """Of a head's scores: "softmax", "sigmoid", "relu" or "none"."""
    weight_scale: float = 8.0
    """What weights are multiplied by; equal to experts_per_head, evenly weighted experts have weight 1, as in LoRA."""
    dropout: float = 0.0
    """Share of retrieved experts dropped per token in training."""
    init_weights: bool = True
    """Whether a new adapter changes nothing until it is trained; False, as in tests of peft's, draws random experts."""
    backend: str = "auto"
    """A name in `peerlm.ops.api.BACKENDS`."""
    row_dim: int | None = None
    """Width of the experts' vectors, with maps that all experts share; None for that of the module, without maps."""
    module_dim: int | None = None
    """What target modules that are no linear layers read and write; None takes their own `dim` or `hidden_size`."""
    target_modules: list[str] | str | None = None
    """Names of modules, or a regular expression for all of a name; "all-linear" is every linear layer. None takes what
    LoRA takes for the type of the model, which are maps of attention."""
    exclude_modules: list[str] | str | None = None
    """Names of modules, or a regular expression, to leave out."""
    modules_to_save: list[str] | None = None
    """Modules besides adapters that are trained and saved."""
    layers_to_transform: list[int] | int | None = None
    """Numbers of the blocks that are adapted; None adapts all."""
    layers_pattern: list[str] | str | None = None
    """Name of the list of blocks, where peft does not know it."""
    peft_type: Any = field(default=_PEFT_TYPE, init=True)
    """Always "PEER_ADAPTER"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = _PEFT_TYPE
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, set(value))
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                f"layers_to_transform is {self.layers_to_transform}, but target_modules is a regular expression, "
                "which says itself which layers it means; name modules in a list, or leave layers_to_transform out"
            )

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As in peft; the file names the type by a sentence, which peft alone shows."""
        super().save_pretrained(save_directory, **kwargs)
        path = Path(save_directory) / CONFIG_NAME
        write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"peft_type": _SAVED_TYPE})


class PeerAdapterModel(BaseTuner):
    """What peft wraps a model into: finds the target modules, and puts a `PeerAdapterLayer` in place of each."""

    prefix = _NAME + "_"
    tuner_layer_cls = PeerAdapterLayer
    target_module_mapping = cast("dict[str, list[str]]", TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, PeerAdapterConfig)
        settings = {name: getattr(peft_config, name) for name in _POOL_SETTINGS}
        if isinstance(target, PeerAdapterLayer):
            target.add_pool(adapter_name, inference_mode=peft_config.inference_mode, **settings)
            return
        over = PeerAdapterLinear if isinstance(target, (nn.Linear, Conv1D)) else PeerAdapterLayer
        layer = over(target, *features_of(target, peft_config.module_dim))
        layer.set_adapter(self.active_adapters)
        layer.add_pool(adapter_name, inference_mode=peft_config.inference_mode, **settings)
        if adapter_name not in self.active_adapters:
            layer.peer_adapter_pools.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """As in peft, but what takes an adapter's place again may be a module without a `weight`."""
        if isinstance(new_module, PeerAdapterLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """As in peft, which casts parameters to float32, and also the statistics of query_norm="batch"."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            for layer in self.modules():
                if isinstance(layer, PeerAdapterLayer) and adapter_name in layer.peer_adapter_pools:
                    _widen_buffers(layer.peer_adapter_pools[adapter_name])

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """What peft enters around each forward pass and `generate`, with their arguments."""
        if kwargs.get("alora_offsets") is not None:
            raise ValueError("alora_offsets is for adapters of the type LORA, not for retrieved ones; leave it out")
        names = kwargs.get("adapter_names")
        with nullcontext() if names is None else adapters_by_row(self.model, names, kwargs):
            yield

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Always raises a ValueError."""
        raise ValueError(
            "retrieved adapters cannot be summed up in one, because each has an index of its own; let several act "
            'together by base_model.set_adapter(["a", "b"])'
        )

    def _check_merge_allowed(self) -> None:
        raise ValueError(CANNOT_MERGE)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """As in peft, which looks for the name before the last part of a key alone: pools are made of modules."""
        pools = PeerAdapterLayer.adapter_layer_names[0]
        return re.sub(rf"(^|\.){pools}\.{re.escape(adapter_name)}\.", rf"\1{pools}.", key)


def _widen_buffers(pool: nn.Module) -> None:
    for module in pool.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.dtype in (torch.float16, torch.bfloat16):
                setattr(module, name, buffer.float())


# Without target_modules, LoRA too then finds those of our own models.
TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault(MODEL_TYPE, ["q_proj", "v_proj"])
register_peft_method(name=_NAME, config_cls=PeerAdapterConfig, model_cls=PeerAdapterModel)
cast("dict[Any, Any]", PEFT_TYPE_TO_CONFIG_MAPPING)[_SAVED_TYPE] = PeerAdapterConfig
