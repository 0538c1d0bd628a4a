"""The experts' rows, and the look-up that sharding, quantisation and offloading replace."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from peerlm.ops import api


class ExpertTable(nn.Module):
    """N single-neuron experts `act(u . x) v`, or `(u . x) act(g . x) v` if gated (He 2024, section 2.1).

    Args:
        num_experts: N.
        dim: width of input and output.
        activation: "gelu", "relu", "silu" or "identity".
        gated: whether experts have a gate vector.
        backend: a name in `peerlm.ops.api.BACKENDS`.
        up_std: standard deviation of v at the start.

    Attributes:
        down, up: u and v, (num_experts, dim).
        gate: g, (num_experts, dim), or None.
    """

    parameter_roles: ClassVar[dict[str, str]] = {"down": "table", "up": "table", "gate": "table"}

    def __init__(
        self,
        num_experts: int,
        dim: int,
        *,
        activation: str = "gelu",
        gated: bool = False,
        backend: str = "auto",
        up_std: float = 1.0,
    ):
        super().__init__()
        api.check_activation(activation)
        api.check_backend(backend)
        self.num_experts = num_experts
        self.dim = dim
        self.activation = activation
        self.backend = backend
        self.down = nn.Parameter(torch.empty(num_experts, dim))
        self.up = nn.Parameter(torch.empty(num_experts, dim))
        self.gate = nn.Parameter(torch.empty(num_experts, dim)) if gated else None
        self.reset_parameters(up_std)

    def reset_parameters(self, up_std: float = 1.0) -> None:
        """u, g ~ N(0, 1 / dim): pre-activations of unit variance. v ~ N(0, up_std^2)."""
        nn.init.normal_(self.down, std=self.dim**-0.5)
        if self.gate is not None:
            nn.init.normal_(self.gate, std=self.dim**-0.5)
        nn.init.normal_(self.up, std=up_std)

    def forward(self, x: Tensor, weights: Tensor, expert_ids: Tensor) -> Tensor:
        """Mix each token's experts: x (T, dim), weights and expert_ids (T, P) -> (T, dim)."""
        return api.mix_experts(
            x,
            weights,
            expert_ids,
            self.down,
            self.up,
            self.gate,
            activation=self.activation,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        return (
            f"num_experts={self.num_experts}, dim={self.dim}, activation={self.activation!r}, "
            f"gated={self.gate is not None}, backend={self.backend!r}"
        )
