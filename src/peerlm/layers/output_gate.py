"""A gate on what a feed-forward layer adds to the residual stream."""

import torch
from torch import Tensor, nn

from peerlm.layers.checks import check_sizes

GATES = ("token", "feature")
"""What a gate has one factor for."""


class OutputGate(nn.Linear):
    """Factors 2 sigmoid(x W) of a layer's output, from its input; without bias.

    W is zero at the start, so that every factor is 1 and the layer is as without a gate.

    Args:
        dim: width of the layer.
        per: "token", one factor for all features, or "feature", one for each.
    """

    def __init__(self, dim: int, per: str = "token"):
        check_sizes(dim=dim)
        if per not in GATES:
            raise ValueError(f"per is {per!r}; choose one of {', '.join(GATES)}")
        super().__init__(dim, 1 if per == "token" else dim, bias=False)

    def reset_parameters(self) -> None:
        """Zero."""
        nn.init.zeros_(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """Factors in 0 .. 2 for x (..., dim): (..., 1) or (..., dim)."""
        return 2 * torch.sigmoid(super().forward(input))
