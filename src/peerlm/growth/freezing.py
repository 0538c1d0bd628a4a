"""Freeze what a model had before it grew, while the experts that were added learn."""

import math
from collections.abc import Callable, Iterable
from types import TracebackType

import torch
from torch import Tensor, nn

from peerlm.growth.indexed import find_indexed_layers
from peerlm.ops.row_keeping import names_of
from peerlm.optim.replace import holds
from peerlm.optim.restrict import hold

PARTS = ("rows", "keys", "query", "rest")


class Frozen:
    """What `freeze_grown` freezes, until `remove()`, or the end of a `with` block."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def remove(self) -> None:
        """Let everything learn again that learned before."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> "Frozen":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def _stop(self, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                parameter.grad = None
                self._undo.append(lambda parameter=parameter: parameter.requires_grad_(True))  # type: ignore[misc]

    def _hold(self, parameter: nn.Parameter, keep: Tensor, dim: int) -> None:
        if parameter.requires_grad:
            self._undo.append(hold(parameter, keep, dim=dim))


@torch.no_grad()
def freeze_grown(
    model: nn.Module,
    what: Iterable[str] = PARTS,
    *,
    before: int | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Frozen:
    """Freeze parts of a model that has grown (`peerlm.growth.grow`), bit for bit, while it is trained.

    Frozen entries get no gradient. A frozen query norm of kind "batch" uses its running statistics in training, too.
    In a copy of the model (`copy.deepcopy`) rows and keys are not frozen.

    Args:
        model: a layer or a model with PEER layers or product-key memories.
        what: of "rows", the old experts, with the maps of a layer whose experts are narrower than the model; "keys",
            the old sub-keys; "query", the map and norm of queries; and "rest", all that is outside of these layers.
        before: how many experts, or values, each layer had; by default `grown_from`, which a layer has until it is
            fully open.
        optimizer: the one that trains the model: it forgets its momentum of frozen rows and sub-keys. One built after
            the growth need not be given.

    Raises:
        ValueError: a part that does not exist; experts that a device caches (`layers.mapped.cached`); the layers do not
            say what they had before and nor does `before`; the optimizer would move what has no gradient, by weight
            decay or in the backward pass; rows of 8 bits that are trained. Nothing is frozen then.
    """
    parts = tuple(what)
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"what has {part!r}; choose of {', '.join(PARTS)}")
    layers = find_indexed_layers(model)
    held: dict[int, tuple[nn.Parameter, Tensor, int]] = {}  # a table that layers share is held once
    for layer in layers:
        old = layer.index.grown_from if before is None else before
        if old is None:
            raise ValueError(f"{layer.where()} does not say how many experts it had before it grew; give before=")
        if not 0 < old <= layer.index.num_experts or math.isqrt(old) ** 2 != old:
            raise ValueError(
                f"before is {old}; give a square number up to the {layer.index.num_experts} of {layer.where()}"
            )
        if "rows" in parts:
            if layer.table.trained_in_place:
                raise ValueError(
                    f"rows in {layer.table.row_format} are updated in the backward pass, frozen or not; take rows in "
                    "float32 or bfloat16"
                )
            keep = torch.arange(layer.table.num_rows, device=layer.table.device) >= old
            held |= {id(parameter): (parameter, keep[rows], 0) for parameter, rows in layer.table.parts()}
        if "keys" in parts:
            sub_keys = layer.index.sub_keys
            keep = torch.arange(sub_keys.shape[2], device=sub_keys.device) >= math.isqrt(old)
            held[id(sub_keys)] = (sub_keys, keep, 2)
    for parameter, _, _ in held.values():
        if names_of(parameter) is not None:
            raise ValueError("experts that a device caches have no place of their own, and cannot be frozen by number")
        _check_optimizer(optimizer, parameter)
    frozen = Frozen()
    if "rows" in parts:
        for layer in layers:
            layer.table.catch_up()
    for parameter, keep, dim in held.values():
        frozen._hold(parameter, keep, dim)
        _forget(optimizer, parameter, keep, dim)
    if "rows" in parts:
        for layer in layers:
            frozen._stop(parameter for each in layer.row_maps for parameter in each.parameters())
    if "query" in parts:
        for layer in layers:
            frozen._stop([*layer.index.query_proj.parameters(), *layer.index.query_norm.parameters()])
    if "rest" in parts:
        inside = {parameter for layer in layers for parameter in layer.module.parameters()}
        frozen._stop(parameter for parameter in model.parameters() if parameter not in inside)
    return frozen


def _check_optimizer(optimizer: torch.optim.Optimizer | None, parameter: Tensor) -> None:
    if optimizer is None or not holds(optimizer, parameter):
        return
    group = next(g for g in optimizer.param_groups if any(member is parameter for member in g["params"]))
    if group.get("weight_decay"):
        raise ValueError(
            f"weight_decay is {group['weight_decay']} for a table or sub-keys, and would move "
            "what is frozen; set it to 0"
        )
    if group.get("fused") and group.get("rows"):
        raise ValueError("RowAdamW(fused=True) updates rows in the backward pass, frozen or not; take fused=False")


def _forget(optimizer: torch.optim.Optimizer | None, parameter: Tensor, keep: Tensor, dim: int) -> None:
    state = {} if optimizer is None else optimizer.state.get(parameter, {})
    for name in ("exp_avg", "momentum_buffer"):  # of Adam's kind, of SGD's
        if (moment := state.get(name)) is not None:
            moment.index_fill_(dim, (~keep).nonzero().flatten(), 0.0)
