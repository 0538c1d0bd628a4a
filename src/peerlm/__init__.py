"""Language models of a million single-neuron experts: `from peerlm import PEER` is the layer.

The public names load on first use: the layers need torch alone, the models also transformers. Importing this package
lets transformers and peft open our models and adapters.
"""

import importlib
from typing import TYPE_CHECKING, Any

from peerlm.registration import register_lazily

if TYPE_CHECKING:
    from peerlm.errors import UserError
    from peerlm.layers import (
        PEER,
        DenseFFW,
        ExpertChoiceMoE,
        ExpertTable,
        FineGrainedMoE,
        HashedNgrams,
        ProductKeyMemory,
        ProductKeys,
        TokenChoiceMoE,
    )
    from peerlm.model import PeerConfig, PeerForCausalLM, PeerModel

__version__ = "0.1.0"

__all__ = [
    "PEER",
    "DenseFFW",
    "ExpertChoiceMoE",
    "ExpertTable",
    "FineGrainedMoE",
    "HashedNgrams",
    "PeerConfig",
    "PeerForCausalLM",
    "PeerModel",
    "ProductKeyMemory",
    "ProductKeys",
    "TokenChoiceMoE",
    "UserError",
    "__version__",
]

_HOMES = {
    "PEER": "layers",
    "DenseFFW": "layers",
    "ExpertChoiceMoE": "layers",
    "ExpertTable": "layers",
    "FineGrainedMoE": "layers",
    "HashedNgrams": "layers",
    "PeerConfig": "model",
    "PeerForCausalLM": "model",
    "PeerModel": "model",
    "ProductKeyMemory": "layers",
    "ProductKeys": "layers",
    "TokenChoiceMoE": "layers",
    "UserError": "errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | _HOMES.keys())


register_lazily()
