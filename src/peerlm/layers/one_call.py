"""Whether a layer may make of a few tokens in one call what else its modules make one after another."""

from collections.abc import Callable, Sequence

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
