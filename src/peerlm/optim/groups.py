"""Parameter groups of a model, and clipping of their gradients.

Expert tables hold most of a PEER model's weights and each row sees few tokens, so that tables and sub-keys
get groups of their own. A module names such parameters itself, in a dict `parameter_roles` from its own
direct parameter names to "table" (expert rows, memory values) or "keys" (sub-keys). With an attribute
`trained_in_place` that is True its tables are trained although they have no gradient.
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
from peerlm.ops.tensors import read_at_once
from peerlm.optim import muon as muon_rule
from peerlm.optim.sparse_gradients import in_order, sum_rows

GROUP_NAMES = ("matrix", muon_rule.GROUP, "vector", "table", "keys")


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float = 0.0,
    table_lr_multiplier: float = 1.0,
    keys_lr_multiplier: float = 1.0,
    muon: bool = False,
) -> list[dict[str, Any]]:
    """Sort the trainable parameters of `model` into groups for a torch optimizer.

    "matrix": weights of two or more dimensions, with weight decay. "vector": norms, biases, embeddings (also where an
    output head shares an embedding). "table" and "keys": as `parameter_roles` declares. With `muon`, matrices that Muon
    takes are in a group "muon", which `RowAdamW` trains so, with the same weight decay; the output head and what is no
    matrix of several rows and columns stay in "matrix". A shared parameter is listed once; empty groups are left out.

    Returns dicts with "params", "name", "weight_decay" and "lr_multiplier", the factor on the scheduled
    learning rate. Raises ValueError when a module declares another role or names a parameter it does not
    have.
    """
    members: dict[str, list[nn.Parameter]] = {name: [] for name in GROUP_NAMES}
    head = getattr(getattr(model, "get_output_embeddings", lambda: None)(), "weight", None)
    for parameter, role in _roles(model).items():
        orthogonal = muon and role == "matrix" and parameter is not head and muon_rule.takes(parameter)
        members[muon_rule.GROUP if orthogonal else role].append(parameter)
    multipliers = {"table": table_lr_multiplier, "keys": keys_lr_multiplier}
    return [
        {
            "params": members[name],
            "name": name,
            "weight_decay": weight_decay if name in ("matrix", muon_rule.GROUP) else 0.0,
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
            in_place = declared.get(name) == "table" and getattr(module, "trained_in_place", False)
            if not parameter.requires_grad and not in_place:
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
    """Euclidean norms of the gradients before clipping, kept on their device until they are asked for as numbers."""

    of_rest: Tensor
    """Of everything but the tables, ()."""
    of_tables: Tensor
    """Of the tables, (); 0 for a model without any."""

    @property
    def rest(self) -> float:
        """Of everything but the tables. Waits for the device."""
        return self.of_rest.item()

    @property
    def table(self) -> float:
        """Of the tables. Waits for the device."""
        return self.of_tables.item()

    @property
    def finite(self) -> bool:
        """Whether neither is NaN or infinite. Waits for the device."""
        return math.isfinite(self.rest) and math.isfinite(self.table)


def clip_gradients(groups: Sequence[dict[str, Any]], *, max_norm: float, table_max_norm: float) -> GradientNorms:
    """Scale gradients in place so that tables and, apart from them, everything else keep within their norms.

    Separate norms, because a table's gradient touches few rows of many: clipped together, either would set
    the step of the other. A limit of math.inf never scales. Nothing is scaled when a norm is not finite. No other
    device than the CPU is waited for.

    Of gradients that lie on several ranks, of FSDP2 or of sharded tables, the norms are those over all; each rank must
    call this. Gradients may be sparse: the rows of an uncoalesced one, a sum over micro-batches, are summed first,
    because its norm is that of the summed rows. Raises ValueError where tables have no gradients that could be clipped,
    under RowAdamW(fused=True).
    """
    if table_max_norm < math.inf and any(group.get("fused") and group.get("rows") for group in groups):
        raise ValueError(
            f"RowAdamW(fused=True) leaves no gradient of tables to clip to table_max_norm = {table_max_norm}: "
            "choose fused=False, or table_max_norm = math.inf"
        )
    of_tables = [group for group in groups if group.get("name") == "table"]
    tables = _gradient_values(of_tables)
    rest = _gradient_values(group for group in groups if group.get("name") != "table")
    device = next((parameter.device for group in groups for parameter in group["params"]), torch.device("cpu"))
    rest_norm = _norm_over_mesh(rest, device)
    measured = [
        in_order(parameter, value) for (parameter, _), value in zip(_with_gradient(of_tables), tables, strict=True)
    ]
    table_norm = _norm_over_ranks(of_tables, measured, device)
    finite = rest_norm.isfinite() & table_norm.isfinite()
    _keep_within(rest, rest_norm, max_norm, finite)
    _keep_within(tables, table_norm, table_max_norm, finite)
    return GradientNorms(of_rest=rest_norm, of_tables=table_norm)


def _gradient_values(groups: Iterable[dict[str, Any]]) -> list[Tensor]:
    return [sum_rows(parameter) if gradient.is_sparse else gradient for parameter, gradient in _with_gradient(groups)]


def _with_gradient(groups: Iterable[dict[str, Any]]) -> list[tuple[Tensor, Tensor]]:
    """Parameters that have a gradient, and that."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    return [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]


def _norm_over_mesh(values: list[Tensor], device: torch.device) -> Tensor:
    """The norm, on a device, of gradients that every rank has whole, or of which FSDP2 has left each rank a part."""
    whole = [value for value in values if not _is_cut(value)]
    if len(whole) == len(values):
        return _norm(whole, device)
    cut: Any = get_total_norm([value for value in values if _is_cut(value)])
    norms = [cut.full_tensor().to(device), _norm(whole, device)]
    return torch.stack(norms).square().sum().sqrt()


def _norm_over_ranks(groups: Sequence[dict[str, Any]], values: list[Tensor], device: torch.device) -> Tensor:
    """The norm, on a device, of gradients of tables, which may be sharded; each rank must call it."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    # Ranks without a gradient take part, too.
    over = {id(shard.group): shard.group for shard in map(shard_of, parameters) if shard is not None}
    if not over:
        return _norm(values, device)
    shards = [shard_of(parameter) for parameter, _ in _with_gradient(groups)]
    of_ranks: dict[int | None, list[Tensor]] = {}
    for shard, value in zip(shards, values, strict=True):
        of_ranks.setdefault(None if shard is None else id(shard.group), []).append(value)
    total = _norm(of_ranks.get(None, []), device).square()
    for key, ranks in over.items():
        square = _norm(of_ranks.get(key, []), device).square()
        if ranks is not None:
            dist.all_reduce(square, group=ranks)
        total = total + square
    return total.sqrt()


def _is_cut(gradient: Tensor) -> bool:
    """Whether FSDP2 has left this rank a part of a gradient."""
    return hasattr(gradient, "full_tensor")


def _norm(values: list[Tensor], device: torch.device) -> Tensor:
    """Of all values of one rank; of none it is zero, of which no copy to the device has to be waited for."""
    return get_total_norm(values).to(device, non_blocking=True) if values else torch.zeros((), device=device)


@torch.no_grad()
def _keep_within(values: list[Tensor], norm: Tensor, most: float, finite: Tensor) -> None:
    """Scale the values of this norm to the norm `most`, where it is larger and `finite` is true."""
    too_large = finite & (norm > most)
    if most == math.inf or (read_at_once(norm.device) and not too_large):
        return
    factor = torch.where(too_large, most / (norm + 1e-6), torch.ones_like(norm))
    for value in values:
        own: Any = value
        local = own.to_local() if _is_cut(value) else value
        local.mul_(factor.to(local.device, non_blocking=True))
