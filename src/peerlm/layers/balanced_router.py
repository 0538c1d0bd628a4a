"""A router whose load is balanced by a bias that no gradient trains."""

from collections.abc import Mapping
from typing import Any
from weakref import WeakSet, ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from peerlm.layers.checks import flatten_tokens
from peerlm.layers.shared_statistics import SharesStatistics
from peerlm.ranks import inside_backward


class BalancedRouter(SharesStatistics):
    """Choose each token's k experts of E; balance them without a loss (Wang 2024, arXiv 2408.15664).

    The affinity of a token and an expert is sigmoid(w . x). The k experts of the largest affinity + bias are chosen;
    their weights are their affinities without the bias, scaled to sum to one (DeepSeek-V3, arXiv 2412.19437, equations
    13 to 16). After each step of the optimizer that has `score.weight`, of whatever class, the bias of every expert
    goes up by `balance_step` if tokens chose it less often than the mean expert since the last one, and down if more
    often. All micro-batches of a step count, once where gradient checkpointing repeats them, and so do all ranks under
    DistributedDataParallel or within `share_statistics`. Padding does not count, and nothing does while `score.weight`
    is frozen. `update_bias` is for an optimizer that is not torch's.

    The bias is a buffer, so that it is saved; choices are counted outside of state dicts, since a checkpoint
    is made between steps. In bfloat16 a bias of 0.25 or more does not change by 0.001: train in float32.

    Args:
        dim: width of the input.
        num_experts: E.
        experts_per_token: k.
        balance_step: what the bias changes by; 0 keeps it.
    """

    bias: Tensor

    def __init__(self, dim: int, *, num_experts: int, experts_per_token: int, balance_step: float):
        super().__init__()
        self.dim = dim
        self.num_experts = num_experts
        self.experts_per_token = experts_per_token
        self.balance_step = balance_step
        self.score = nn.Linear(dim, num_experts, bias=False)
        self.register_buffer("bias", torch.empty(num_experts))
        self.load: Tensor | None = None
        self.reset_parameters()
        _routers.add(self)

    def reset_parameters(self) -> None:
        """Scores of unit variance for inputs of unit mean square; no bias."""
        nn.init.normal_(self.score.weight, std=self.dim**-0.5)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights (float32 at least) and expert ids (int64) of x (..., dim), each (..., 1, experts_per_token).

        The bool `mask` (...) is False at padding, which chooses too but does not count.
        """
        x_TD, mask_T = flatten_tokens(x, mask, self.dim)
        weights_TK, ids_TK = self._choose(self.score(x_TD))
        if self.training and self.score.weight.requires_grad:
            self._ranks()
            if not inside_backward():  # a repeated batch has been counted
                self._count(ids_TK, mask_T)
        shape = (*x.shape[:-1], 1, self.experts_per_token)
        return weights_TK.view(shape), ids_TK.view(shape)

    def _choose(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        affinities_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32)).sigmoid()
        ids_TK = (affinities_TE.detach() + self.bias).topk(self.experts_per_token, dim=-1).indices
        weights_TK = affinities_TE.gather(-1, ids_TK)
        total_T1 = weights_TK.sum(dim=-1, keepdim=True)
        return weights_TK / total_T1.clamp(min=torch.finfo(total_T1.dtype).tiny), ids_TK

    @torch.no_grad()
    def initial_weight_power(self) -> float:
        """Mean over tokens of the sum of squared weights at the start, by 4096 fixed tokens."""
        generator = torch.Generator().manual_seed(0)
        logits_TE = torch.randn(4096, self.num_experts, generator=generator, device="cpu")
        chosen_TK = logits_TE.sigmoid().topk(self.experts_per_token, dim=-1).values
        return (chosen_TK / chosen_TK.sum(dim=-1, keepdim=True)).square().sum().item() / len(logits_TE)

    @torch.no_grad()
    def _count(self, ids_TK: Tensor, mask_T: Tensor | None) -> None:
        chosen = ids_TK if mask_T is None else torch.where(mask_T[:, None], ids_TK, self.num_experts)
        load_E = torch.zeros(self.num_experts + 1, dtype=torch.int64, device=ids_TK.device)
        load_E = load_E.index_add(0, chosen.flatten(), torch.ones_like(chosen.flatten()))[:-1]
        # No buffer: DistributedDataParallel would let all ranks have the first one's.
        self.load = load_E if self.load is None else self.load.to(load_E.device) + load_E

    @torch.no_grad()
    def update_bias(self) -> None:
        """Move the bias by what was chosen since the last call; over several ranks each must call it."""
        if self.load is None:
            return
        if self._last_group is not None:
            dist.all_reduce(self.load, group=self._last_group)
        excess_E = self.num_experts * self.load - self.load.sum()
        self.bias.sub_(self.balance_step * excess_E.sign().to(self.bias))
        self.load = None

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        super().__setstate__(state)
        _routers.add(self)

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        return f"experts_per_token={self.experts_per_token}, balance_step={self.balance_step}"


_routers: WeakSet[BalancedRouter] = WeakSet()


_outermost: ref[Optimizer] | None = None
"""The optimizer that steps now, not one within it: ZeroRedundancyOptimizer steps another one, which has the weights of
its own rank alone."""


def _note_outermost(optimizer: Optimizer, _args: object, _settings: object) -> None:
    global _outermost
    outer = None if _outermost is None else _outermost()
    # One whose step has failed is still noted here.
    if _routers and (outer is None or not _weights(optimizer) <= _weights(outer)):
        _outermost = ref(optimizer)


def _weights(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _update_biases(optimizer: Optimizer, _args: object, _settings: object) -> None:
    """After a step of any optimizer: routers whose weights it has, in the order of these, which ranks share."""
    global _outermost
    if not _routers or (_outermost is not None and _outermost() not in (None, optimizer)):
        return
    _outermost = None
    router_of = {id(router.score.weight): router for router in list(_routers)}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in router_of:
                router_of[id(parameter)].update_bias()


register_optimizer_step_pre_hook(_note_outermost)
register_optimizer_step_post_hook(_update_biases)
