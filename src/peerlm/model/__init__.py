"""The language model, native to transformers."""

from transformers import AutoModel, AutoModelForCausalLM

from peerlm.model.configuration_peer import FFW_KINDS, PeerConfig
from peerlm.model.modeling_peer import PeerForCausalLM, PeerModel

# `peerlm.registration` wrote the names, but transformers may have indexed its configurations by then.
AutoModel.register(PeerConfig, PeerModel, exist_ok=True)
AutoModelForCausalLM.register(PeerConfig, PeerForCausalLM, exist_ok=True)

__all__ = ["FFW_KINDS", "PeerConfig", "PeerForCausalLM", "PeerModel"]
