"""The door to Hugging Face: our models, converted models and adapters, known to transformers and peft.

`import peerlm` alone lets transformers and peft open what they are asked for; importing this module loads it all, so
that what is missing shows at once.
"""

import importlib.util

import peerlm.convert.record  # noqa: F401, what rebuilds converted models
from peerlm.model import PeerConfig, PeerForCausalLM, PeerModel

__all__ = ["PeerConfig", "PeerForCausalLM", "PeerModel"]

if importlib.util.find_spec("peft") is not None:
    from peerlm.adapters.config import PeerAdapterConfig, PeerAdapterModel

    __all__ += ["PeerAdapterConfig", "PeerAdapterModel"]
