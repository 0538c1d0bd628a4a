"""A gate on what a feed-forward layer adds to the residual stream."""

import torch
from torch import Tensor, nn

from peerlm.layers.checks import check_sizes

GATES = ("token", "feature")
"""What a gate has one factor for."""


class OutputGate(nn.Module):
    """Factors 2 sigmoid(x W) of a layer's output, from its input; without bias.

    It is no `nn.Linear`: what replaces all of these by linear layers of its own, as vLLM does, would lose the sigmoid.

    W is zero at the start, so that every factor is 1 and the layer is as without a gate.

    Args:
        dim: width of the layer.
        per: "token", one factor for all features, or "feature", one for each.
    """

    def __init__(self, dim: int, per: str = "token"):
        check_sizes(dim=dim)
        if per not in GATES:
            raise ValueError(f"per is {per!r}; choose one of {', '.join(GATES)}")
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1 if per == "token" else dim, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero."""
        nn.init.zeros_(self.weight)

    def extra_flops_per_token(self, context: int) -> int:
        """Of the product."""
        return 2 * self.weight.numel()

    def forward(self, input: Tensor) -> Tensor:
        """Factors in 0 .. 2 for x (..., dim): (..., 1) or (..., dim)."""
        return 2 * torch.sigmoid(nn.functional.linear(input, self.weight))

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        return f"dim={self.weight.shape[1]}, per={'token' if len(self.weight) == 1 else 'feature'!r}"
