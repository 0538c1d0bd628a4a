"""Parameter groups of a model, and clipping of their gradients.

Expert tables hold most of a PEER model's weights and each row sees few tokens, so that tables and sub-keys
get groups of their own. A module names such parameters itself, in a dict `parameter_roles` from its own
direct parameter names to "table" (expert rows, memory values) or "keys" (sub-keys).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from peerlm.errors import listed
from peerlm.ops.row_shards import shard_of
from peerlm.optim.sparse_gradients import coalesced

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
                raise ValueError(f"{path}.parameter_roles names {name!r}, which it does not have: {listed(own)}")
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

    Of gradients that lie on several ranks, of FSDP2 or of sharded tables, the norms are those over all; each rank must
    call this. Gradients may be sparse: an uncoalesced one, a sum over micro-batches, is coalesced first, because its
    norm is that of the summed rows. Raises ValueError where tables have no gradients that could be clipped, under
    RowAdamW(fused=True).
    """
    if table_max_norm < math.inf and any(group.get("fused") and group.get("rows") for group in groups):
        raise ValueError(
            f"RowAdamW(fused=True) leaves no gradient of tables to clip to table_max_norm = {table_max_norm}: "
            "choose fused=False, or table_max_norm = math.inf"
        )
    of_tables = [group for group in groups if group.get("name") == "table"]
    tables = _gradient_values(of_tables)
    rest = _gradient_values(group for group in groups if group.get("name") != "table")
    rest_norm, table_norm = _norm_over_mesh(rest), _norm_over_ranks(of_tables, tables)
    norms = GradientNorms(rest=rest_norm.item(), table=table_norm.item())
    if norms.finite and norms.rest > max_norm:
        _scale(rest, max_norm / (rest_norm + 1e-6))
    if norms.finite and norms.table > table_max_norm:
        _scale(tables, table_max_norm / (table_norm + 1e-6))
    return norms


def _gradient_values(groups: Iterable[dict[str, Any]]) -> list[Tensor]:
    values = []
    for parameter in _with_gradient(groups):
        assert parameter.grad is not None
        if parameter.grad.is_sparse:
            parameter.grad = coalesced(parameter.grad)
            values.append(parameter.grad._values())  # not values(), which refuses to be scaled in place
        else:
            values.append(parameter.grad)
    return values


def _norm_over_mesh(values: list[Tensor]) -> Tensor:
    """The norm of gradients that every rank has whole, or of which FSDP2 has left each rank a part."""
    whole = [value for value in values if not hasattr(value, "full_tensor")]
    if len(whole) == len(values):
        return get_total_norm(whole)
    cut = get_total_norm([value for value in values if hasattr(value, "full_tensor")]).full_tensor()  # type: ignore[attr-defined]
    return torch.stack([get_total_norm(whole).to(cut), cut]).square().sum().sqrt()


def _norm_over_ranks(groups: Sequence[dict[str, Any]], values: list[Tensor]) -> Tensor:
    """The norm of gradients of tables, which may be sharded; each rank must call it."""
    of_tables = [(value, shard_of(table)) for table, value in zip(_with_gradient(groups), values, strict=True)]
    # Ranks without a gradient take part: which groups there are is said by the tables.
    shards = [shard_of(parameter) for group in groups for parameter in group["params"]]
    over = {id(shard.group): shard.group for shard in shards if shard is not None}
    if not over:
        return get_total_norm(values)
    device = next(parameter.device for group in groups for parameter in group["params"])
    total = get_total_norm([value for value, shard in of_tables if shard is None]).to(device).float().square()
    for key, ranks in over.items():
        own = [value for value, shard in of_tables if shard is not None and id(shard.group) == key]
        square = get_total_norm(own).to(device).float().square()
        if ranks is not None:
            dist.all_reduce(square, group=ranks)
        total = total + square
    return total.sqrt()


def _with_gradient(groups: Iterable[dict[str, Any]]) -> list[Tensor]:
    return [parameter for group in groups for parameter in group["params"] if parameter.grad is not None]


def _scale(values: list[Tensor], factor: Tensor) -> None:
    with torch.no_grad():
        for value in values:
            local = value.to_local() if hasattr(value, "to_local") else value
            local.mul_(factor.to(local.device))
