"""Batch normalisation of queries that is right in a language model."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from peerlm.layers.shared_statistics import SharesStatistics
from peerlm.ranks import inside_backward


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose backward all-reduces too: each rank's loss depends on every rank's sum."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: "dist.ProcessGroup") -> Tensor:
        ctx.group = group
        total = local.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class QueryBatchNorm(SharesStatistics):
    """BatchNorm over the features of queries, with what a language model asks of it.

    Padding is left out of the statistics; ranks share them under DistributedDataParallel and where `share_statistics`
    says so, and only there: elsewhere a rank that trains alone would wait for the others. Evaluation uses the running
    statistics, so that generation is causal and does not depend on the rest of the batch. With fewer than two tokens,
    running statistics are used in training too. So they are, unchanged, while `weight` is frozen (`requires_grad`
    False): a frozen layer computes what it computes in evaluation. Statistics are in float32 at least. In training a
    token's output does depend on the whole batch, later tokens included, through two moments per feature.

    Args:
        num_features: size of the last dimension.
        eps: added to the variance.
        momentum: share of the newest batch in the running statistics.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, *, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.weight = nn.Parameter(torch.empty(num_features))
        self.bias = nn.Parameter(torch.empty(num_features))
        self.register_buffer("running_mean", torch.empty(num_features))
        self.register_buffer("running_var", torch.empty(num_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Identity map, no statistics yet."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        nn.init.zeros_(self.running_mean)
        nn.init.ones_(self.running_var)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise x (T, num_features); rows where the bool `mask` (T,) is False do not count."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        of_batch = self.training and self.weight.requires_grad
        group = self._ranks() if of_batch else None
        alike = self.weight.dtype == self.running_mean.dtype == wide.dtype
        if alike and not (of_batch and (mask is not None or len(x) < 2 or group is not None)):
            return self._by_torch(wide, of_batch).to(x.dtype)
        if of_batch:
            mean, var = self._batch_statistics(wide, mask, group)
        else:
            mean, var = self.running_mean.to(wide.dtype), self.running_var.to(wide.dtype)
        normalised = (wide - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias
        return normalised.to(x.dtype)

    def _by_torch(self, x: Tensor, of_batch: bool) -> Tensor:
        """What PyTorch's own operator can do, in a fifth of the time: no padding, one rank."""
        running = self.running_mean, self.running_var
        if of_batch and inside_backward():
            running = running[0].clone(), running[1].clone()
        return F.batch_norm(x, *running, self.weight, self.bias, of_batch, self.momentum, self.eps)

    def _batch_statistics(
        self, x: Tensor, mask: Tensor | None, group: "dist.ProcessGroup | None"
    ) -> tuple[Tensor, Tensor]:
        def over_ranks(local: Tensor) -> Tensor:
            return local if group is None else _SumOverRanks.apply(local, group)

        counted = torch.ones_like(x[:, :1]) if mask is None else mask[:, None].to(x.dtype)
        count = over_ranks(counted.sum())
        safe_count = count.clamp(min=1)
        mean = over_ranks((x * counted).sum(dim=0)) / safe_count
        var = over_ranks(((x - mean).square() * counted).sum(dim=0)) / safe_count
        enough = count > 1
        if not inside_backward():  # a repeated batch has been counted
            self._update_running(mean.detach(), var.detach() * (count / (count - 1).clamp(min=1)), enough)
        running_mean, running_var = self.running_mean.to(x.dtype), self.running_var.to(x.dtype)
        return torch.where(enough, mean, running_mean), torch.where(enough, var, running_var)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, unbiased_var: Tensor, enough: Tensor) -> None:
        share = self.momentum * enough.to(self.running_mean.dtype)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(unbiased_var.to(self.running_var.dtype), share)

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"
