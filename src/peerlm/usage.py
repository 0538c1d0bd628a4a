"""Expert usage and unevenness, measured by hooks on any model.

He 2024 (arXiv 2407.04153, section 3.3) sums over all tokens and heads the weight each expert received, z,
normalised to sum 1. Usage is the share of experts with z_i != 0; unevenness is the KL divergence from z to
uniform use, log N + sum_i z_i log z_i, in nats: 0 when all N experts carry equal weight, log N when one
carries it all.

Shape suffixes: H heads, K retrieved per head, N experts; `...` any leading dimensions of tokens.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from peerlm.ranks import Ranks


class ExpertUsage:
    """Running sums of the weight and the number of retrievals of each expert.

    Sums are float64 (weights) and int64 (retrievals) of shape (num_experts,), kept on one device. They are read back to
    the host only when a figure is asked for.
    """

    def __init__(self, num_experts: int, device: torch.device | str | None = None) -> None:
        if num_experts < 1:
            raise ValueError(f"num_experts is {num_experts}; it must be at least 1")
        self.num_experts = num_experts
        self.weight_N = torch.zeros(num_experts, dtype=torch.float64, device=device)
        self.retrievals_N = torch.zeros(num_experts, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, weights: Tensor, expert_ids: Tensor, mask: Tensor | None = None) -> None:
        """Count one retrieval: weights and expert_ids (..., H, K), mask (...) with True for real tokens.

        Weights may be negative (raw scores): their magnitude counts. Raises ValueError when shapes disagree.
        """
        if weights.shape != expert_ids.shape:
            raise ValueError(
                f"weights {tuple(weights.shape)} and expert_ids {tuple(expert_ids.shape)} differ in shape; "
                "pass what one retrieval returned"
            )
        if mask is not None and mask.shape != weights.shape[:-2]:
            raise ValueError(
                f"mask {tuple(mask.shape)} does not fit weights {tuple(weights.shape)}; "
                f"give one flag per token: {tuple(weights.shape[:-2])}"
            )
        magnitude = weights.abs()
        counts = torch.ones((), dtype=torch.int64, device=weights.device)
        if mask is not None:
            real = mask.bool()[..., None, None]
            magnitude = magnitude.masked_fill(~real, 0.0)
            counts = real.to(torch.int64)
        ids = expert_ids.reshape(-1)
        self.weight_N.scatter_add_(0, ids, magnitude.reshape(-1).to(torch.float64))
        self.retrievals_N.scatter_add_(0, ids, counts.expand(expert_ids.shape).reshape(-1))

    def grow(self, num_experts: int) -> None:
        """Count more experts from now on, with sums of zero; raises ValueError where there would be fewer."""
        if num_experts < self.num_experts:
            raise ValueError(f"num_experts is {num_experts}, fewer than the {self.num_experts} that were counted")
        for name in ("weight_N", "retrievals_N"):
            counted = getattr(self, name)
            setattr(self, name, torch.cat([counted, counted.new_zeros(num_experts - self.num_experts)]))
        self.num_experts = num_experts

    def merge(self, ranks: Ranks) -> None:
        """Sum over ranks, in place; each must call it, once, after its last `add`."""
        ranks.total(self.weight_N)
        ranks.total(self.retrievals_N)

    def _sum(self, local: Tensor) -> Tensor:
        """A number of the experts that are counted here, summed over all."""
        return local

    @property
    def share(self) -> float:
        """Share of the experts that received any weight, 0 to 1 ("usage")."""
        return self._sum(torch.count_nonzero(self.weight_N)).item() / self.num_experts

    @property
    def unevenness(self) -> float:
        """KL divergence to uniform use in nats, 0 to log N; log N, too, when no weight was recorded."""
        total = self._sum(self.weight_N.sum())
        used = self.weight_N[self.weight_N != 0]  # of millions of experts a step uses few
        z = used / torch.where(total == 0, torch.ones_like(total), total)
        return math.log(self.num_experts) + self._sum(torch.xlogy(z, z).sum()).item()


class Owners(Protocol):
    """Ranks each of which counts the experts whose rows it holds."""

    def num_own(self) -> int:
        """How many those are on this rank."""

    def own(self, weights: Tensor, expert_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Of all ranks' retrievals (T, P) those of this rank's experts: weights (E,) and their numbers here, (E,)."""

    def sum(self, local: Tensor) -> Tensor:
        """A number of each rank's experts, summed over all."""


class SharedUsage(ExpertUsage):
    """As `ExpertUsage`, for experts that are cut over ranks: each rank counts its own, those of all ranks' tokens.

    All ranks must add, and ask for figures, together; they get the same.
    """

    def __init__(self, num_experts: int, owners: Owners, device: torch.device | str | None = None) -> None:
        super().__init__(max(owners.num_own(), 1), device)
        self.num_experts, self.owners = num_experts, owners

    @torch.no_grad()
    def add(self, weights: Tensor, expert_ids: Tensor, mask: Tensor | None = None) -> None:
        """As of `ExpertUsage`."""
        per_token = weights.shape[-2:].numel()
        magnitude, ids = weights.abs().reshape(-1, per_token), expert_ids.reshape(-1, per_token)
        if mask is not None:
            ids = ids.masked_fill(~mask.reshape(-1, 1).bool(), -1)
        magnitude, ids = self.owners.own(magnitude.float(), ids)
        self.weight_N.scatter_add_(0, ids, magnitude.double())
        self.retrievals_N.scatter_add_(0, ids, torch.ones_like(ids))

    def grow(self, num_experts: int) -> None:
        """As of `ExpertUsage`."""
        self.num_experts, total = len(self.weight_N), num_experts
        super().grow(max(self.owners.num_own(), 1))
        self.num_experts = total

    def merge(self, ranks: Ranks) -> None:
        """Nothing: no expert is counted by two ranks."""

    def _sum(self, local: Tensor) -> Tensor:
        return self.owners.sum(local)


@contextmanager
def record_usage(model: nn.Module) -> Iterator[dict[str, ExpertUsage]]:
    """Record, while the context is open, every retrieval made inside `model`.

    Yields a dict from a submodule's name to its `ExpertUsage`, filled as the model runs. A submodule is
    recorded when it has an integer attribute `num_experts` and returns (weights, expert_ids), each (..., H,
    K), as `ProductKeys` does. Padding is excluded where the submodule is called with a `mask`, by position
    after x or by name. Counts continue where a layer grows (`peerlm.growth.grow`). The hooks are removed on exit,
    also when an exception passes through.
    """
    usage: dict[str, ExpertUsage] = {}
    handles = [
        module.register_forward_hook(partial(_record, usage, name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "num_experts", None), int)
    ]
    try:
        yield usage
    finally:
        for handle in handles:
            handle.remove()


def _record(
    usage: dict[str, ExpertUsage],
    name: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> None:
    if not is_retrieval(output):
        return
    weights, expert_ids = output
    if name not in usage:
        owners: Owners | None = getattr(module, "usage_owners", None)
        count: Any = module.num_experts
        usage[name] = (
            ExpertUsage(count, device=weights.device)
            if owners is None
            else SharedUsage(count, owners, device=weights.device)
        )
    if module.num_experts > usage[name].num_experts:  # type: ignore[operator]
        usage[name].grow(module.num_experts)  # type: ignore[arg-type]
    mask = kwargs.get("mask", args[1] if len(args) > 1 else None)
    usage[name].add(weights, expert_ids, mask)


def is_retrieval(output: Any) -> bool:
    """Whether a module's output is (weights, expert_ids)."""
    return (
        isinstance(output, tuple)
        and len(output) == 2
        and all(isinstance(part, Tensor) for part in output)
        and output[0].is_floating_point()
        and not output[1].is_floating_point()
    )
