"""The query's matrix product by oneDNN, which takes half the time of PyTorch's own choice on some processors.

PyTorch multiplies float32 matrices by MKL where it was built with it. `torch.ops.peerlm.linear` has a schema, a fake
and an autograd formula as the operators of `cpu.py` have; its gradients are products by oneDNN too.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

FEW_TOKENS = 8
"""Below, calling the operator costs more than it saves."""


def linear(x_TD: Tensor, weight_OD: Tensor) -> Tensor:
    """The product x W^T, (T, O), as `torch.nn.functional.linear`; oneDNN's own rounding where it computes it."""
    few = not torch.compiler.is_compiling() and x_TD.shape[0] < FEW_TOKENS  # a size to compile for must stay open
    if few or not supported(x_TD, weight_OD):
        return functional.linear(x_TD, weight_OD)
    return torch.ops.peerlm.linear(x_TD.contiguous(), weight_OD.contiguous())


def supported(*tensors: Tensor) -> bool:
    """Whether oneDNN multiplies these: float32 on a CPU, and no autocast that asks for less."""
    return _AVAILABLE and all(
        tensor.device.type == "cpu" and tensor.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        for tensor in tensors
    )


_AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_LIBRARY = torch.library.Library("peerlm", "FRAGMENT")
_LIBRARY.define("linear(Tensor x, Tensor weight) -> Tensor")


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """The product x W^T; either may be a transposed view."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x.detach(), weight.detach(), None, "none", [], "")
    return product


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    grad_y = grad_y.contiguous()
    grad_x = torch.ops.peerlm.linear(grad_y, weight.t()) if ctx.needs_input_grad[0] else None
    grad_weight = torch.ops.peerlm.linear(x.t(), grad_y.t()).t() if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight


_LIBRARY.impl("linear", _product, "CPU")
torch.library.register_fake("peerlm::linear", lambda x, weight: x.new_empty(x.shape[0], weight.shape[0]), lib=_LIBRARY)
torch.library.register_autograd("peerlm::linear", _gradients, setup_context=_save, lib=_LIBRARY)
