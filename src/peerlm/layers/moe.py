"""Mixtures of large experts: experts choose tokens, or tokens choose experts."""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peerlm.layers.checks import check_sizes, flatten_tokens
from peerlm.layers.output_scale import input_std, output_std
from peerlm.ops import api
from peerlm.ops.functions import ACTIVATIONS


class _LargeExperts(nn.Module, ABC):
    """What both mixtures share: a linear router and `num_experts` dense FFWs of `hidden` neurons, stacked."""

    def __init__(self, dim: int, *, num_experts: int, hidden: int | None, activation: str):
        super().__init__()
        hidden = 4 * dim if hidden is None else hidden
        check_sizes(dim=dim, num_experts=num_experts, hidden=hidden)
        api.check_activation(activation)
        self.dim = dim
        self.num_experts = num_experts
        self.hidden = hidden
        self.activation = activation
        self.router = nn.Linear(dim, num_experts, bias=False)
        self.down = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.up = nn.Parameter(torch.empty(num_experts, hidden, dim))

    def reset_parameters(self, output_scale: float = 1.0) -> None:
        """The router N(0, 1 / dim), the others by `output_scale.py`, those of the output times `output_scale`."""
        nn.init.normal_(self.router.weight, std=self.dim**-0.5)
        nn.init.normal_(self.down, std=input_std(self.dim, self.activation))
        std = output_std(self.hidden * self._initial_gate_power(), self.activation)
        nn.init.normal_(self.up, std=output_scale * std)

    @torch.no_grad()
    def _initial_gate_power(self) -> float:
        """Mean over tokens of the sum of squared gates, for 4096 fixed tokens of standard normal logits."""
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(4096, self.num_experts, generator=generator, device="cpu")
        gates, _ = self._choose(logits, None)
        return gates.square().sum().item() / len(logits)

    @abstractmethod
    def _choose(self, logits_TE: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the router chooses for logits (T, E): gates and indices, in the layout of the mixture."""

    def _expert_parameters(self) -> int:
        return 2 * self.dim * self.hidden


class ExpertChoiceMoE(_LargeExperts):
    """Mixture in which experts choose tokens (Zhou 2022, arXiv 2202.09368).

    Each expert takes the C tokens that it scores highest, C = tokens * capacity_factor / num_experts rounded
    up. The load is even by construction; a token may be taken by several experts or by none. The choice is
    made among all tokens of the call, so a token's output depends on later tokens and on the rest of the
    batch: this layer is NOT causal, its language-model loss is flattered by that, and it cannot generate
    token by token as it was trained.

    Args:
        dim: width of input and output.
        num_experts: E.
        hidden: hidden neurons per expert, 4 * dim if None.
        capacity_factor: experts per token on average.
        activation: "gelu", "gelu_tanh", "relu", "silu", "identity" or "one_plus".
    """

    chooses_among_tokens = True
    """What is true of no causal layer; evaluation says so beside its figures."""

    def __init__(
        self,
        dim: int,
        *,
        num_experts: int = 16,
        hidden: int | None = None,
        capacity_factor: float = 1.0,
        activation: str = "gelu",
    ):
        super().__init__(dim, num_experts=num_experts, hidden=hidden, activation=activation)
        if not 0 < capacity_factor <= num_experts:
            raise ValueError(
                f"capacity_factor is {capacity_factor}; it is the mean number of experts per token, "
                f"so take 0 < capacity_factor <= num_experts = {num_experts}"
            )
        self.capacity_factor = capacity_factor
        self.reset_parameters()

    def _choose(self, logits_TE: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Tensor]:
        """Gates and token indices, each (E, C)."""
        tokens = len(logits_TE) if mask_T is None else int(mask_T.sum())
        scores_TE = _wide_softmax(logits_TE)
        if mask_T is not None:
            scores_TE = scores_TE.masked_fill(~mask_T[:, None], -1.0)  # below a score that underflowed to 0
        capacity = math.ceil(tokens * self.capacity_factor / self.num_experts)
        gates_EC, tokens_EC = scores_TE.T.topk(min(capacity, tokens), dim=-1)
        return gates_EC, tokens_EC

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map x (..., dim) to (..., dim); padding (mask False) is not chosen, and takes no capacity."""
        x_TD, mask_T = flatten_tokens(x, mask, self.dim)
        gates_EC, tokens_EC = self._choose(self.router(x_TD), mask_T)
        chosen_ECD = x_TD.index_select(0, tokens_EC.flatten()).view(*tokens_EC.shape, self.dim)  # sums in one order
        hidden_ECF = ACTIVATIONS[self.activation](torch.bmm(chosen_ECD, self.down))
        out_ECD = torch.bmm(hidden_ECF, self.up)
        weighted = (out_ECD * gates_EC[..., None].to(out_ECD.dtype)).flatten(0, 1)
        y_TD = torch.zeros_like(x_TD, dtype=weighted.dtype).index_add(0, tokens_EC.flatten(), weighted)
        return y_TD.to(x.dtype).view(x.shape)

    def extra_flops_per_token(self, context: int) -> int:
        """Forward FLOPs of the experts, at their mean number per token; the router counts itself."""
        return round(4 * self.dim * self.hidden * self.capacity_factor)

    def inactive_parameters(self) -> int:
        """Expert parameters that a token leaves untouched, on average."""
        return round((self.num_experts - self.capacity_factor) * self._expert_parameters())


class TokenChoiceMoE(_LargeExperts):
    """Mixture in which each token chooses its k best experts (Shazeer 2017; load balancing as Fedus 2022).

    The k softmax gates are scaled to sum to one, so with k = 1 only the balance loss trains the router. No
    token is dropped. In training `balance_loss` holds Fedus
    2022's loss (equation 4): E * sum over experts of (share of choices) * (mean router probability), 1 when
    the load is even; add it to the loss with a small coefficient.

    Args:
        dim: width of input and output.
        num_experts: E.
        experts_per_token: k <= E.
        hidden: hidden neurons per expert, 4 * dim if None.
        activation: "gelu", "gelu_tanh", "relu", "silu", "identity" or "one_plus".
    """

    balance_loss: Tensor | None = None

    def __init__(
        self,
        dim: int,
        *,
        num_experts: int = 16,
        experts_per_token: int = 2,
        hidden: int | None = None,
        activation: str = "gelu",
    ):
        super().__init__(dim, num_experts=num_experts, hidden=hidden, activation=activation)
        if not 1 <= experts_per_token <= num_experts:
            raise ValueError(f"experts_per_token is {experts_per_token}; take 1 to num_experts = {num_experts} of them")
        self.experts_per_token = experts_per_token
        self.reset_parameters()

    def _choose(self, logits_TE: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Tensor]:
        """Gates and expert ids, each (T, k)."""
        gates_TK, experts_TK = _wide_softmax(logits_TE).topk(self.experts_per_token, dim=-1)
        return gates_TK / gates_TK.sum(dim=-1, keepdim=True), experts_TK

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map x (..., dim) to (..., dim); padding (mask False) is left out of the balance loss."""
        x_TD, mask_T = flatten_tokens(x, mask, self.dim)
        logits_TE = self.router(x_TD)
        gates_TK, experts_TK = self._choose(logits_TE, mask_T)
        self.balance_loss = self._balance(logits_TE, experts_TK, mask_T) if self.training else None
        y_TD = torch.zeros_like(x_TD)
        for expert in range(self.num_experts):
            token, rank = (experts_TK == expert).nonzero(as_tuple=True)
            hidden = ACTIVATIONS[self.activation](x_TD[token] @ self.down[expert])
            out = (hidden @ self.up[expert]) * gates_TK[token, rank, None].to(hidden.dtype)
            y_TD = y_TD.index_add(0, token, out.to(y_TD.dtype))
        return y_TD.view(x.shape)

    def _balance(self, logits_TE: Tensor, experts_TK: Tensor, mask_T: Tensor | None) -> Tensor:
        probabilities_TE = _wide_softmax(logits_TE)
        chosen_TE = F.one_hot(experts_TK, self.num_experts).sum(dim=1).to(probabilities_TE.dtype)
        if mask_T is not None:
            probabilities_TE, chosen_TE = probabilities_TE[mask_T], chosen_TE[mask_T]
        tokens = max(len(chosen_TE), 1)
        share_E = chosen_TE.sum(dim=0) / (tokens * self.experts_per_token)
        return self.num_experts * (share_E * probabilities_TE.sum(dim=0) / tokens).sum()

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: all but the last balance loss, which belongs to a graph."""
        return self.__dict__ | {"balance_loss": None}

    def extra_flops_per_token(self, context: int) -> int:
        """Forward FLOPs of the chosen experts; the router counts itself."""
        return 4 * self.dim * self.hidden * self.experts_per_token

    def inactive_parameters(self) -> int:
        """Expert parameters that one token leaves untouched."""
        return (self.num_experts - self.experts_per_token) * self._expert_parameters()


def _wide_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)
