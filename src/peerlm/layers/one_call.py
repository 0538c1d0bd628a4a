"""Whether a layer may make of a few tokens in one call what else its modules make one after another."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

FEW_TOKENS = 64
"""Up to here the calls of a layer's parts may take longer than their work."""


def nobody_looks_on(*modules: nn.Module) -> bool:
    """Whether no gradient is wanted, and nothing else sees or changes what these modules do.

    Others are hooks, tracers, modes, autocast, and a module's own `forward` in place of its class's.
    torch.compile is asked for before.
    """
    return not (
        torch.is_grad_enabled()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch.is_autocast_enabled("cpu")
        or _has_any_global_hook()
        or any(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in modules)
    )


def where(tensors: Sequence[Tensor | None]) -> list[object]:
    """Where tensors lie, and the dtype of the first; whoever casts a module casts all of them."""
    first = tensors[0]
    dtype = None if first is None else first.dtype
    return [dtype, *[None if tensor is None else tensor.data_ptr() for tensor in tensors]]


class Prepared:
    """A call that a layer has made ready, and what that depends on; copies and pickles have none."""

    state: object = None
    call: Callable[[Tensor], Tensor | None] | None = None

    def __reduce__(self) -> tuple[type["Prepared"], tuple[()]]:
        """As one that is not ready yet."""
        return Prepared, ()


class Unchanged:
    """What calls that were made ready depend on: modules, their attributes and weights, and where these lie.

    Attributes:
        hooks: the hooks of all these modules; one that is not empty looks on.
    """

    def __init__(self) -> None:
        self.hooks: list[dict[int, Any]] = []
        self._links: list[tuple[dict[str, Any], str, object]] = []
        self._kinds: list[tuple[nn.Module, type[nn.Module]]] = []
        self._tensors: list[Tensor] = []
        self._where: list[int] = []

    def link(self, owner: dict[str, Any], name: str) -> None:
        """Depend on what an owner has by a name, which may be nothing."""
        self._links.append((owner, name, owner.get(name)))

    def add(self, module: nn.Module, *names: str) -> type[nn.Module] | None:
        """Depend on a module, or on its parts and weights of these names alone: its class, or None if others call it.

        What its parts have is not looked at.
        """
        own = vars(module)
        self._kinds.append((module, type(module)))
        for name in ("forward", *(each for each in own if not each.startswith("_") and not names)):
            self.link(own, name)
        for parts in (own["_modules"], own["_parameters"], own["_buffers"]):
            for name in parts:
                if not names or name in names:
                    self.link(parts, name)
                    self._tensors += [parts[name]] if isinstance(parts[name], Tensor) else []
        self._where = [tensor.data_ptr() for tensor in self._tensors]
        self.hooks += [own["_forward_hooks"], own["_forward_pre_hooks"]]
        return None if "forward" in own else type(module)

    def add_all_of(self, module: nn.Module) -> None:
        """Depend on a module and all its parts, also on those that another module owns."""
        self.add(module)
        own = vars(module)
        for part in (*own["_modules"].values(), *own.values()):
            if isinstance(part, nn.Module):
                self.add_all_of(part)

    def holds(self) -> bool:
        """Whether all is as it was, and weights are where they were."""
        for owner, name, value in self._links:
            if owner.get(name) is not value:
                return False
        for module, kind in self._kinds:
            if type(module) is not kind:
                return False
        return [tensor.data_ptr() for tensor in self._tensors] == self._where
