"""How a converted model is saved and rebuilt: its configuration records the conversion, and loading repeats it.

transformers has one public hook between building a model from its configuration and loading the weights: a registered
quantizer. That is what `RebuildConverted` is to transformers, by the configuration's `quantization_config`. Nothing is
quantised, so that a loaded model keeps none of the marks of a quantised one: it trains, compiles and changes its dtype
as any other.

Where peerlm was not imported, transformers would warn of the unknown quantization type "peerlm" and continue without:
`peerlm.custom_code` is what makes it refuse.
"""

from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from peerlm.convert.insertion import FFWSite, put_beside, put_in_place
from peerlm.convert.kinds import KINDS
from peerlm.names import CONVERTED

MODES = ("beside", "replace")


def _unreadable(reason: str) -> ValueError:
    return ValueError(
        f"the record of a conversion cannot be read ({reason}); restore config.json, or install the version of peerlm "
        "that wrote it"
    )


class ConversionConfig(QuantizationConfigMixin):
    """What was done to a model: plain values, saved in its config.json as `quantization_config`."""

    def __init__(
        self,
        *,
        mode: str | None = None,
        init: str | None = None,
        settings: dict[str, Any] | None = None,
        sites: list[dict[str, Any]] | None = None,
        **_: Any,
    ):
        if mode is None or init is None or settings is None or sites is None:
            given = {"mode": mode, "init": init, "settings": settings, "sites": sites}
            raise _unreadable(f"it lacks {', '.join(name for name, value in given.items() if value is None)}")
        if mode not in MODES:
            raise _unreadable(f"mode is {mode!r}")
        self.quant_method: Any = CONVERTED
        self.mode = mode
        self.init = init
        self.settings = settings
        self.sites = sites

    @classmethod
    def of(cls, mode: str, init: str, settings: dict[str, Any], sites: list[FFWSite]) -> "ConversionConfig":
        """The record of a conversion."""
        return cls(mode=mode, init=init, settings=settings, sites=[asdict(site) for site in sites])

    def read_sites(self) -> list[FFWSite]:
        """The feed-forward layers that were converted."""
        return [FFWSite(**site) for site in self.sites]


def conversion_of(model: PreTrainedModel) -> ConversionConfig | None:
    """What was done to this model by `convert`; None if nothing was."""
    record = getattr(model.config, "quantization_config", None)
    return record if isinstance(record, ConversionConfig) else None


class RebuildConverted(HfQuantizer):
    """Puts the layers of a converted model into it before the weights are loaded."""

    quantization_config: ConversionConfig

    def __init__(self, quantization_config: ConversionConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise ValueError("a saved model cannot be converted while it is loaded; load it, then call convert(model)")

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        record = self.quantization_config
        if record.init not in KINDS:
            raise ValueError(
                f"this model was converted with init={record.init!r}, which this version of peerlm does not know "
                f"({', '.join(KINDS)}); install the version that converted it"
            )
        kind = KINDS[record.init]
        try:
            layers = {site: kind.skeleton(site, record.settings) for site in record.read_sites()}
        except TypeError as error:  # a setting or a property that is not known
            raise _unreadable(str(error)) from error
        kind.finish(list(layers.values()), record.settings)
        (put_beside if record.mode == "beside" else put_in_place)(model, layers)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name in ("hf_quantizer", "is_quantized", "quantization_method"):
            if name in vars(model):
                delattr(model, name)
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and hasattr(module.config, "_is_quantized"):
                del module.config._is_quantized
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        """Weights are saved as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Nothing is quantised."""
        return True
