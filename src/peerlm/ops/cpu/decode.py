"""A whole layer for a few tokens in one native call: the calls of its parts would take longer than their work."""

from collections.abc import Callable

import torch
from torch import Tensor

from peerlm.ops.cpu import native
from peerlm.ops.cpu.native import as_bytes
from peerlm.ops.row_formats import SCALED_DTYPES, width
from peerlm.ops.tensors import has_values
from peerlm.ops.whole_layer import WholeLayer

FEW_TOKENS = 4
"""Up to here sub-keys are read as they are, once for each token."""
_ROW_DTYPES = (torch.float32, torch.bfloat16, *SCALED_DTYPES)


def whole_layer(layer: WholeLayer) -> Callable[[Tensor], Tensor | None] | None:
    """As `api.whole_layer`, for plain contiguous tensors on a CPU, in float32 but for the rows."""
    if native.unavailable() or not _takes(layer):
        return None
    run = native.module.whole_layer(
        layer.query_map.detach(),
        layer.norm,
        [each.detach() for each in layer.norms],
        layer.epsilon,
        layer.sub_keys.detach(),
        layer.key_length,
        layer.k,
        layer.weighting,
        layer.pairing,
        layer.weight_scale,
        as_bytes(layer.rows.detach()),
        layer.scales,
        layer.activation,
    ).run
    dim = width(layer.rows)

    def call(x: Tensor) -> Tensor | None:
        tokens = x.numel() // dim
        if x.shape[-1:] != (dim,) or not 0 < tokens <= FEW_TOKENS or x.dtype != torch.float32:
            return None
        if not (x.is_cpu and x.is_contiguous() and has_values(x)):
            return None
        y = torch.empty_like(x)
        run(x.data_ptr(), tokens, y.data_ptr())
        return y

    return call


def _takes(layer: WholeLayer) -> bool:
    rows = layer.rows
    if not (rows.is_cpu and rows.dtype in _ROW_DTYPES and rows.is_contiguous() and has_values(rows)):
        return False
    return all(
        each.is_cpu and each.dtype == torch.float32 and each.is_contiguous() and has_values(each)
        for each in layer.tensors()
    )
