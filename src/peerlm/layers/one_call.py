"""Whether a layer may make of a few tokens in one call what else its modules make one after another."""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, Protocol
from weakref import ref

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


class _Layer(Protocol):
    dim: int

    def few_tokens_call(self) -> Callable[[Tensor], Tensor | None] | None: ...


def in_one_call(layer: _Layer, x: Tensor, mask: Tensor | None) -> Tensor | None:
    """What a layer makes of a few tokens x (..., dim) without gradients and where nothing else looks on; or None.

    What else may be wrong with the arguments is found without it.
    """
    if torch.compiler.is_compiling() or x.numel() > FEW_TOKENS * layer.dim:
        return None
    if mask is not None and mask.shape != x.shape[:-1]:
        return None
    call = layer.few_tokens_call()
    return None if call is None else call(x)


class Prepared:
    """A call that a layer has made ready, and what that depends on; copies and pickles have none."""

    state: object = None
    call: Callable[[Tensor], Tensor | None] | None = None

    def __reduce__(self) -> tuple[type["Prepared"], tuple[()]]:
        """As one that is not ready yet."""
        return Prepared, ()


class Unchanged:
    """What calls that were made ready depend on: modules, their attributes and weights, and where these lie.

    It keeps none of these alive: a table that was replaced is gone.

    Attributes:
        hooks: the hooks of all these modules; one that is not empty looks on.
    """

    def __init__(self) -> None:
        self.hooks: list[dict[int, Any]] = []
        self._links: list[tuple[dict[str, Any], str, object]] = []
        self._seen: list[_Seen] = []

    def link(self, owner: dict[str, Any], name: str) -> None:
        """Depend on what an owner has by a name, which may be nothing."""
        self._links.append((owner, name, owner.get(name)))

    def add(self, module: nn.Module, *names: str) -> type[nn.Module] | None:
        """Depend on a module, or on its parts and weights of these names alone: its class, or None if others call it.

        What its parts have is not looked at.
        """
        self._seen.append(_Seen(module, names))
        self.hooks += [module._forward_hooks, module._forward_pre_hooks]
        return None if "forward" in vars(module) else type(module)

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
        return all(each.holds() for each in self._seen)


class _Seen:
    """What a module had, by weak references to modules and tensors."""

    def __init__(self, module: nn.Module, names: Sequence[str]):
        own = vars(module)
        self._module, self._kind = ref(module), type(module)
        self._forward = own.get("forward")
        self._held: list[tuple[str | None, str, Callable[[], object]]] = []
        self._where: list[tuple[str | None, str, int]] = []
        self._none: list[tuple[str, str]] = []
        plain = ["training"]  # one at the least, as `itemgetter` needs
        for name, value in own.items():
            if name.startswith("_") or names or name in ("forward", "training"):
                continue
            if isinstance(value, (nn.Module, Tensor)):
                self._hold(None, name, value)
            else:
                plain.append(name)
        self._values_of = itemgetter(*plain)
        self._values = self._values_of(own)
        for group in ("_modules", "_parameters", "_buffers"):
            for name, value in own[group].items():
                if names and name not in names:
                    continue
                if value is None:
                    self._none.append((group, name))
                else:
                    self._hold(group, name, value)

    def holds(self) -> bool:
        """Whether it has them still."""
        module = self._module()
        if module is None or type(module) is not self._kind:
            return False
        own = module.__dict__
        try:
            if self._values_of(own) != self._values or own.get("forward") is not self._forward:
                return False
        except (KeyError, ValueError):  # gone, or an array, which may be another
            return False
        for group, name, was in self._held:
            has = (own if group is None else own[group]).get(name)
            if has is None or has is not was():
                return False
        for group, name in self._none:
            if own[group].get(name) is not None:
                return False
        for group, name, place in self._where:
            if (own if group is None else own[group])[name].data_ptr() != place:
                return False
        return True

    def _hold(self, group: str | None, name: str, value: nn.Module | Tensor) -> None:
        self._held.append((group, name, ref(value)))
        if isinstance(value, Tensor):
            self._where.append((group, name, value.data_ptr()))
