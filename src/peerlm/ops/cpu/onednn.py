"""The query's matrix product by oneDNN, which takes half the time of PyTorch's own choice on some processors.

PyTorch multiplies float32 matrices by MKL where it was built with it. The gradients are products by oneDNN too.
"""

import torch
from torch import Tensor
from torch.nn import functional

from peerlm.ops.operators import PEERLM
from peerlm.ops.tensors import not_plain

FEW_TOKENS = 8
"""Below, calling the operator costs more than it saves."""


def linear(x_TD: Tensor, weight_OD: Tensor) -> Tensor:
    """The product x W^T, (T, O), as `torch.nn.functional.linear`; oneDNN's own rounding where it computes it."""
    few = not torch.compiler.is_compiling() and x_TD.shape[0] < FEW_TOKENS  # a size to compile for must stay open
    if few or not supported(x_TD, weight_OD):
        return functional.linear(x_TD, weight_OD)
    return PEERLM.ops.linear(x_TD.contiguous(), weight_OD.contiguous())


def supported(*tensors: Tensor) -> bool:
    """Whether oneDNN multiplies these: float32 on a CPU, plain tensors, and no autocast that asks for less."""
    return (
        _AVAILABLE
        and all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
        and not torch.is_autocast_enabled("cpu")
        and not not_plain(*tensors)
    )


_AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """The product x W^T; either may be a transposed view."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x.detach(), weight.detach(), None, "none", [], "")
    return product


if _AVAILABLE:
    PEERLM.implement({"linear": _product}, "CPU")
