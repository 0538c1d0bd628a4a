"""Fine-grained mixture of experts: many small SwiGLU experts, of which each token chooses several."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peerlm.layers.balanced_router import BalancedRouter
from peerlm.layers.checks import check_sizes, flatten_tokens
from peerlm.layers.dense import DenseFFW
from peerlm.layers.output_scale import input_std, output_std
from peerlm.ops.grouped_products import grouped_product


class FineGrainedMoE(nn.Module):
    """Token-choice mixture of small SwiGLU experts beside shared ones (DeepSeekMoE 2024, arXiv 2401.06066).

    y = shared(x) + routed_scale * sum over the k chosen experts of weight * expert(x), with the weights and balance
    of DeepSeek-V3 (arXiv 2412.19437, equations 12 to 16); see `BalancedRouter`. V3's small loss for balance within a
    sequence is left out. No token is dropped; tokens do not depend on each other, so that the layer is causal.
    Entries are sorted by expert, and all experts multiply theirs in one grouped product.

    Args:
        dim: width of input and output.
        num_experts: E, routed experts.
        experts_per_token: k <= E.
        hidden: hidden neurons per expert, dim / 2 rounded down if None.
        shared_experts: experts that every token has besides; 0 or more.
        routed_scale: what weights are multiplied by; 2.5 is V3's.
        balance_step: what the bias of an expert changes by at each step of the optimizer; 0.001 is V3's.

    Attributes:
        router: the index, `BalancedRouter`.
        down: (num_experts, dim, 2 * hidden): the maps into an expert's hidden neurons, then those to their gates.
        up: (num_experts, hidden, dim).
        shared: the shared experts, one `DenseFFW`; or None.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_experts: int = 64,
        experts_per_token: int = 8,
        hidden: int | None = None,
        shared_experts: int = 1,
        routed_scale: float = 2.5,
        balance_step: float = 1e-3,
    ):
        super().__init__()
        hidden = max(1, dim // 2) if hidden is None else hidden
        check_sizes(dim=dim, num_experts=num_experts, experts_per_token=experts_per_token, hidden=hidden)
        if experts_per_token > num_experts:
            raise ValueError(f"experts_per_token is {experts_per_token}; take 1 to num_experts = {num_experts} of them")
        if shared_experts:
            check_sizes(shared_experts=shared_experts)
        if not 0.0 < routed_scale < math.inf:
            raise ValueError(f"routed_scale is {routed_scale}; it multiplies weights, so take a number above 0")
        if not 0.0 <= balance_step < math.inf:
            raise ValueError(f"balance_step is {balance_step}; take a number of at least 0")
        self.dim = dim
        self.num_experts = num_experts
        self.experts_per_token = experts_per_token
        self.hidden = hidden
        self.routed_scale = routed_scale
        self.router = BalancedRouter(
            dim, num_experts=num_experts, experts_per_token=experts_per_token, balance_step=balance_step
        )
        self.down = nn.Parameter(torch.empty(num_experts, dim, 2 * hidden))
        self.up = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.shared: DenseFFW | None = None
        if shared_experts:
            self.shared = DenseFFW(dim, hidden=shared_experts * hidden, activation="silu", gated=True)
        self.reset_parameters()

    def reset_parameters(self, output_scale: float = 1.0) -> None:
        """The router by its own rule, experts by `output_scale.py`, their output times `output_scale`.

        Shared and routed experts start alike.
        """
        self.router.reset_parameters()
        routed = self.hidden * self.routed_scale**2 * self.router.initial_weight_power()
        shared = 0 if self.shared is None else self.shared.up_proj.in_features
        nn.init.normal_(self.down, std=input_std(self.dim))
        nn.init.normal_(self.up, std=output_scale * output_std(routed + shared, "silu"))
        if self.shared is not None:
            self.shared.reset_parameters(output_scale * math.sqrt(shared / (routed + shared)))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map x (..., dim) to (..., dim); padding (mask False) is mapped too, but does not count for the balance."""
        x_TD, _ = flatten_tokens(x, mask, self.dim)
        weights, ids = self.router(x, mask)
        y_TD = self._mix(x_TD, *(each.reshape(-1, self.experts_per_token) for each in (weights, ids)))
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD.to(x.dtype).view(x.shape)

    def _mix(self, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        """The weighted sum of each token's experts; M = T * K entries, sorted by expert."""
        sorted_M, entry_M = ids_TK.flatten().sort(stable=True)
        place_M = torch.empty_like(entry_M).index_copy(0, entry_M, torch.arange(len(entry_M), device=entry_M.device))
        experts_E = torch.arange(self.num_experts, device=ids_TK.device)
        ends_E = torch.searchsorted(sorted_M, experts_E, right=True, out_int32=True)
        x_MD = _ToEntries.apply(x_TD, entry_M, place_M)
        neurons_MF, gates_MF = grouped_product(x_MD, self.down, ends_E).chunk(2, dim=-1)
        weights_M1 = (self.routed_scale * weights_TK).flatten().index_select(0, entry_M)[:, None]
        hidden_MF = neurons_MF * F.silu(gates_MF) * weights_M1.to(neurons_MF.dtype)
        return _SumOfEntries.apply(grouped_product(hidden_MF, self.up, ends_E), entry_M, place_M, len(x_TD))

    def extra_flops_per_token(self, context: int) -> int:
        """Forward FLOPs of the chosen experts; router and shared experts count themselves."""
        return 2 * self.experts_per_token * self._expert_parameters()

    def inactive_parameters(self) -> int:
        """Expert parameters that one token leaves untouched."""
        return (self.num_experts - self.experts_per_token) * self._expert_parameters()

    def _expert_parameters(self) -> int:
        return 3 * self.dim * self.hidden


class _ToEntries(torch.autograd.Function):
    """Copy each token to its entries; the gradient is summed in a fixed order, unlike that of indexing on a GPU."""

    @staticmethod
    def forward(x_TD: Tensor, entry_M: Tensor, place_M: Tensor) -> Tensor:
        per_token = len(entry_M) // max(len(x_TD), 1)
        return x_TD.index_select(0, entry_M // max(per_token, 1))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        x_TD, entry_M, place_M = inputs
        ctx.save_for_backward(entry_M, place_M)
        ctx.tokens = len(x_TD)

    @staticmethod
    def backward(ctx: Any, gradient_MD: Tensor) -> tuple[Tensor, None, None]:
        return _SumOfEntries.apply(gradient_MD, *ctx.saved_tensors, ctx.tokens), None, None


class _SumOfEntries(torch.autograd.Function):
    """Sum the entries of each token: the transpose of `_ToEntries`."""

    @staticmethod
    def forward(y_MD: Tensor, entry_M: Tensor, place_M: Tensor, tokens: int) -> Tensor:
        return y_MD.index_select(0, place_M).view(tokens, len(place_M) // max(tokens, 1), y_MD.shape[1]).sum(dim=1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
        _, entry_M, place_M, ctx.tokens = inputs
        ctx.save_for_backward(entry_M, place_M)

    @staticmethod
    def backward(ctx: Any, gradient_TD: Tensor) -> tuple[Tensor, None, None, None]:
        return _ToEntries.apply(gradient_TD, *ctx.saved_tensors), None, None, None
