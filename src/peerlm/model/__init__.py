"""The language model, native to transformers: importing this package registers it with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from peerlm.model.configuration_peer import FFW_KINDS, PeerConfig
from peerlm.model.modeling_peer import PeerForCausalLM, PeerModel

AutoConfig.register("peer", PeerConfig)
AutoModel.register(PeerConfig, PeerModel)
AutoModelForCausalLM.register(PeerConfig, PeerForCausalLM)

__all__ = ["FFW_KINDS", "PeerConfig", "PeerForCausalLM", "PeerModel"]
