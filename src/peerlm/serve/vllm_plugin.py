"""Our language model for vLLM: a plugin that vLLM finds by its entry point, in each of its processes."""

from functools import lru_cache
from typing import Any

from peerlm.model.configuration_peer import CONFIGURABLE_KINDS
from peerlm.names import CONVERTED, CONVERTED_EARLIER, MODEL_TYPE

ARCHITECTURE = "PeerForCausalLM"
"""The name in a saved model's config.json."""


def register() -> None:
    """Tell vLLM of our model, and make its operators known; vLLM calls this in every process."""
    from vllm import ModelRegistry

    import peerlm.hf  # noqa: F401, transformers must know the model type
    from peerlm.ops.api import load_backends

    load_backends()
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}:PeerForVllm")
    _refuse_converted()


def _refuse_converted() -> None:
    """Have vLLM say what a converted model is: it reads the record of a conversion as a way to quantise weights."""
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    class Converted(QuantizationConfig):
        """Asked of every model whose configuration has such a record."""

        @classmethod
        def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: Any, hf_config: Any = None) -> None:
            """None for models of others. Raises ValueError for converted ones."""
            if (hf_quant_cfg or {}).get("quant_method") in (CONVERTED, CONVERTED_EARLIER):
                raise ValueError("vLLM cannot serve a model that peerlm has converted: use `peerlm serve`")

    register_quantization_config(CONVERTED)(Converted)


def unsupported(config: Any) -> list[str]:
    """What a configuration of ours has that vLLM would compute wrongly, in words.

    Its attention and cache know no shift and no sink, and its batches no layer that reads ids or whole batches. It
    stores rows of all formats as floats.
    """
    parts = " ".join(config.ffw_layers) if isinstance(config.ffw_layers, (list, tuple)) else str(config.ffw_layers)
    options = ("kv_shift", "attention_sink")
    found = [name for name in options if getattr(config, name, False)]
    for kind in CONFIGURABLE_KINDS:
        row_format = (getattr(config, kind, None) or {}).get("row_format", "float32")
        if row_format not in ("float32", "bfloat16"):
            found.append(f"{kind} rows in {row_format}")
    return found + [f"{kind} layers" for kind in ("hashed_ngrams", "expert_choice") if kind in parts]


@lru_cache(maxsize=1)
def _model_class() -> type:
    """The class of vLLM for models of transformers, which refuses what it would compute wrongly."""
    from vllm.model_executor.models.transformers import TransformersForCausalLM

    class PeerForVllm(TransformersForCausalLM):
        """Our language model behind vLLM's attention."""

        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            config = vllm_config.model_config.hf_config
            if config.model_type == MODEL_TYPE and (found := unsupported(config)):
                without = ", or train it with --set model.kv_shift=false" if "kv_shift" in found else ""
                raise ValueError(
                    f"vLLM cannot serve this model, which has {', '.join(found)}: use `peerlm serve`{without}"
                )
            super().__init__(vllm_config=vllm_config, prefix=prefix)

    PeerForVllm.__module__ = __name__
    return PeerForVllm


def __getattr__(name: str) -> Any:
    """The model's class, made when vLLM first asks for it."""
    if name == "PeerForVllm":
        return _model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
