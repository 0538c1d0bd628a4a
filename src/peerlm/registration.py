"""Makes our models and adapters known to transformers and peft when these are imported, and loads neither of them.

`import peerlm` calls `register_lazily`, in any order of imports. `peerlm.hf` registers at once.

What transformers needs to know is written into its tables as names; the classes load when it first asks for them. peft
has no such tables, so that the adapters load with it.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from peerlm.custom_code import mark, unmarked
from peerlm.names import CONVERTED, CONVERTED_EARLIER, MODEL_TYPE

_MODEL_MODULE = f"transformers.models.{MODEL_TYPE}"


class _ModelModule(ModuleType):
    """Stands where transformers looks for the module of a model type, and loads ours when a class is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("Peer"):
            return getattr(importlib.import_module("peerlm.model"), name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


def _mark_configurations(module: Any) -> None:
    """Let configurations be marked in files (`peerlm.custom_code`), and only there."""
    base = module.PreTrainedConfig
    write, read = base.to_json_file, base.get_config_dict.__func__
    if hasattr(write, "__wrapped__"):  # done before
        return

    @wraps(write)
    def to_json_file(self: Any, json_file_path: Any, *args: Any, **options: Any) -> None:
        write(self, json_file_path, *args, **options)
        mark(Path(json_file_path))

    @wraps(read)
    def get_config_dict(cls: Any, *args: Any, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        values, rest = read(cls, *args, **options)
        return unmarked(values), rest

    base.to_json_file = to_json_file
    base.get_config_dict = classmethod(get_config_dict)


def _name_configuration(module: Any) -> None:
    sys.modules.setdefault(_MODEL_MODULE, _ModelModule(_MODEL_MODULE))
    module.CONFIG_MAPPING_NAMES[MODEL_TYPE] = "PeerConfig"


def _name_models(module: Any) -> None:
    module.MODEL_MAPPING_NAMES[MODEL_TYPE] = "PeerModel"
    module.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MODEL_TYPE] = "PeerForCausalLM"


def _name_converted(module: Any) -> None:
    def load() -> Any:
        return importlib.import_module("peerlm.convert.record")

    for method in (CONVERTED, CONVERTED_EARLIER):
        module.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = SimpleNamespace(
            from_dict=lambda record: load().ConversionConfig.from_dict(record)
        )
        module.AUTO_QUANTIZER_MAPPING[method] = lambda config, **options: load().RebuildConverted(config, **options)


def _load_adapters(peft: ModuleType) -> None:
    try:
        importlib.import_module("peerlm.adapters.config")
    except Exception as error:
        version = getattr(peft, "__version__", "of an unknown version")
        warnings.warn(f"peerlm cannot add its adapters to peft {version}: {error}; install peerlm[peft]", stacklevel=2)


_ACTIONS: dict[str, Callable[[Any], None]] = {
    "transformers.configuration_utils": _mark_configurations,
    "transformers.models.auto.configuration_auto": _name_configuration,
    "transformers.models.auto.modeling_auto": _name_models,
    "transformers.quantizers.auto": _name_converted,
    "peft": _load_adapters,
}
"""What is done when a module has been imported."""


class _AfterImport(MetaPathFinder):
    """Finds nothing itself, and lets the modules of `_ACTIONS` be followed by their action."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        action = _ACTIONS.get(name)
        if action is None:
            return None
        finders = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(name, path, target) for finder in finders)
        spec = next((spec for spec in found if spec is not None), None)
        loader: Any = spec and spec.loader
        if loader is not None:
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                del loader.exec_module
                execute(module)
                action(module)

            loader.exec_module = exec_module
        return spec


def register_lazily() -> None:
    """Register with transformers and peft now where they are imported already, and otherwise when they are."""
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
    for name, action in _ACTIONS.items():
        module = sys.modules.get(name)
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            action(module)
