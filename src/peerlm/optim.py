"""How each kind of weight is trained: parameter groups, gradient clipping, learning-rate schedules.

Expert tables hold most of a PEER model's weights and each row sees few tokens, so that tables and sub-keys
get groups of their own. A module names such parameters itself, in a dict `parameter_roles` from its own
direct parameter names to "table" (expert rows, memory values) or "keys" (sub-keys).

Schedules are pure functions of progress, the share of the budget that is spent: they hold no state to save
and know nothing of steps, so that any budget works.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

GROUP_NAMES = ("matrix", "vector", "table", "keys")


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float = 0.0,
    table_lr_multiplier: float = 1.0,
    keys_lr_multiplier: float = 1.0,
) -> list[dict[str, Any]]:
    """Sort the trainable parameters of `model` into groups for a torch optimizer.

    "matrix": weights of two or more dimensions, the only group with weight decay. "vector": norms, biases,
    embeddings (also where an output head shares an embedding). "table" and "keys": as `parameter_roles`
    declares. A shared parameter is listed once; empty groups are left out.

    Returns dicts with "params", "name", "weight_decay" and "lr_multiplier", the factor on the scheduled
    learning rate. Raises ValueError when a module declares another role or names a parameter it does not
    have.
    """
    members: dict[str, list[nn.Parameter]] = {name: [] for name in GROUP_NAMES}
    for parameter, role in _roles(model).items():
        members[role].append(parameter)
    multipliers = {"table": table_lr_multiplier, "keys": keys_lr_multiplier}
    return [
        {
            "params": members[name],
            "name": name,
            "weight_decay": weight_decay if name == "matrix" else 0.0,
            "lr_multiplier": multipliers.get(name, 1.0),
        }
        for name in GROUP_NAMES
        if members[name]
    ]


def _roles(model: nn.Module) -> dict[nn.Parameter, str]:
    roles: dict[nn.Parameter, str] = {}
    for path, module in model.named_modules():
        declared: dict[str, str] = getattr(module, "parameter_roles", {})
        own = dict(module.named_parameters(recurse=False))
        for name, role in declared.items():
            if role not in ("table", "keys"):
                raise ValueError(f"{path}.parameter_roles gives {name!r} the role {role!r}; use 'table' or 'keys'")
            if not hasattr(module, name):
                raise ValueError(f"{path}.parameter_roles names {name!r}, which it does not have: {sorted(own)}")
        for name, parameter in own.items():
            if not parameter.requires_grad:
                continue
            plain = "vector" if parameter.ndim < 2 or isinstance(module, nn.Embedding) else "matrix"
            role = declared.get(name, plain)
            # A shared parameter keeps the more particular of its roles: an embedding beats the output head
            # it is tied to.
            if roles.get(parameter, "matrix") == "matrix":
                roles[parameter] = role
    return roles


@dataclass(frozen=True, kw_only=True)
class GradientNorms:
    """Euclidean norms of the gradients before clipping."""

    rest: float
    """Of everything but the tables."""
    table: float
    """Of the tables; 0 for a model without any."""

    @property
    def finite(self) -> bool:
        """Whether neither is NaN or infinite."""
        return math.isfinite(self.rest) and math.isfinite(self.table)


def clip_gradients(groups: Sequence[dict[str, Any]], *, max_norm: float, table_max_norm: float) -> GradientNorms:
    """Scale gradients in place so that tables and, apart from them, everything else keep within their norms.

    Separate norms, because a table's gradient touches few rows of many: clipped together, either would set
    the step of the other. A limit of math.inf never scales. Nothing is scaled when a norm is not finite.
    """
    tables = _with_gradients(group for group in groups if group["name"] == "table")
    rest = _with_gradients(group for group in groups if group["name"] != "table")
    rest_norm, table_norm = (get_total_norm([p.grad for p in part if p.grad is not None]) for part in (rest, tables))
    norms = GradientNorms(rest=rest_norm.item(), table=table_norm.item())
    if norms.finite and norms.rest > max_norm:
        clip_grads_with_norm_(rest, max_norm, rest_norm)
    if norms.finite and norms.table > table_max_norm:
        clip_grads_with_norm_(tables, table_max_norm, table_norm)
    return norms


def _with_gradients(groups: Iterable[dict[str, Any]]) -> list[nn.Parameter]:
    return [parameter for group in groups for parameter in group["params"] if parameter.grad is not None]


def cosine(progress: float, *, warmup: float, final: float) -> float:
    """Share of the peak learning rate: linear warmup, then half a cosine down to `final`.

    progress, warmup: shares of the budget, 0 to 1. final: share of the peak that is left at the end.
    """
    if progress < warmup:
        return progress / warmup
    past = (progress - warmup) / (1 - warmup) if warmup < 1 else 1.0
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(past, 1.0)))


def wsd(progress: float, *, warmup: float, decay: float, final: float) -> float:
    """Share of the peak learning rate: linear warmup, stable peak, linear decay to `final`.

    progress, warmup, decay: shares of the budget, 0 to 1, warmup + decay <= 1. With decay 0 the peak holds
    to the end.
    """
    if progress < warmup:
        return progress / warmup
    if progress <= 1 - decay or decay == 0:
        return 1.0
    left = max(0.0, (1 - progress) / decay)
    return final + (1 - final) * left


def decaying_multiplier(progress: float, *, start: float) -> float:
    """A learning-rate multiplier that goes linearly from `start` to 1 over the run."""
    return start + (1.0 - start) * min(progress, 1.0)


def set_learning_rates(
    groups: Sequence[dict[str, Any]], learning_rate: float, *, progress: float, table_lr_decay: bool = False
) -> None:
    """Set "lr" in each group of `parameter_groups`: the scheduled learning rate times its multiplier.

    With table_lr_decay, the multiplier of "table" goes linearly to 1 over the run.
    """
    for group in groups:
        multiplier = group["lr_multiplier"]
        if table_lr_decay and group["name"] == "table":
            multiplier = decaying_multiplier(progress, start=multiplier)
        group["lr"] = learning_rate * multiplier
