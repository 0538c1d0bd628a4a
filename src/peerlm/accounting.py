"""Parameters, active parameters, FLOPs and bytes per token of any layer or model.

A multiply-add counts as two FLOPs. Matrix products count, element-wise work and top-k selection do not, as in
`torch.utils.flop_counter`, with which this agrees. Attention counts the full context, not its causal half.
Training costs three forward passes. A module whose work is not in a child `nn.Linear` says so itself:

    extra_flops_per_token(context) -> int   forward FLOPs besides those of its children
    inactive_parameters() -> int            own or children's parameters that one token does not touch
"""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a layer or model holds, and what one token costs."""

    total_parameters: int
    """Every parameter, tied ones once."""
    active_parameters: int
    """Parameters that one token touches."""
    forward_flops_per_token: int
    """FLOPs of a forward pass, per token of a full context."""
    training_flops_per_token: int
    """Forward and backward: three times the forward FLOPs."""
    parameter_bytes_per_token: int
    """Bytes of parameters that one token touches, at the model's mean bytes per parameter."""


def model_cost(model: nn.Module, context: int) -> Cost:
    """Cost of a layer or model at a context of `context` tokens (only attention depends on it).

    An embedding that is not also the output matrix costs one row per token.
    """
    parameters = {id(p): p for p in model.parameters()}.values()
    total = sum(p.numel() for p in parameters)
    size = sum(p.numel() * p.element_size() for p in parameters)
    linear_weights = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    flops, inactive = 0, 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            flops += 2 * module.in_features * module.out_features
        elif isinstance(module, nn.Embedding) and id(module.weight) not in linear_weights:
            inactive += (module.num_embeddings - 1) * module.embedding_dim
        if extra_flops := getattr(module, "extra_flops_per_token", None):
            flops += extra_flops(context)
        if inactive_parameters := getattr(module, "inactive_parameters", None):
            inactive += inactive_parameters()
    active = total - inactive
    return Cost(
        total_parameters=total,
        active_parameters=active,
        forward_flops_per_token=flops,
        training_flops_per_token=3 * flops,
        parameter_bytes_per_token=round(active * size / total) if total else 0,
    )
