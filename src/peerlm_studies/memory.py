"""Memory that training takes, estimated from sizes alone."""

from transformers import PreTrainedConfig

STATE_BYTES = 16
"""Per parameter: the weight, its gradient and AdamW's two means in float32, of every row of a table too."""
BLOCK_BYTES = 34
"""Per token, block and unit of width: activations kept for the backward pass in 16 bits, without attention's scores
(Korthikanti 2022, arXiv 2205.05198, section 4.1)."""
LOGIT_BYTES = 12
"""Per token and entry of the vocabulary: logits, their softmax and its gradient in float32."""


def training_bytes(
    total_parameters: int,
    config: PreTrainedConfig,
    *,
    tokens: int,
    bf16: bool = False,
    gradient_checkpointing: bool = False,
) -> int:
    """Bytes of weights, gradients and optimizer, and an estimate of what one forward pass keeps.

    Args:
        total_parameters: of the model.
        config: of a PeerForCausalLM.
        tokens: in one forward pass, the micro-batch.
        bf16: whether activations have 16 bits; else 32.
        gradient_checkpointing: whether one block's activations are kept at a time.
    """
    blocks = 1 if gradient_checkpointing else config.num_hidden_layers
    of_blocks = (1 if bf16 else 2) * BLOCK_BYTES * blocks * config.hidden_size
    return STATE_BYTES * total_parameters + tokens * (of_blocks + LOGIT_BYTES * config.vocab_size)
