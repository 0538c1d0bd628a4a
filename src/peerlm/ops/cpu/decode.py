"""A feed-forward layer for a few tokens in one native call: calls of its parts would take longer than their work."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peerlm.ops.cpu import native
from peerlm.ops.cpu.native import as_bytes
from peerlm.ops.row_formats import SCALED_DTYPES, width
from peerlm.ops.tensors import has_values
from peerlm.ops.whole_layer import DenseLayer, WholeLayer

MOST_TOKENS = 64
"""More keep threads busy in each call of their own."""
DENSE_TOKENS = 8
"""Likewise, of a dense layer, whose products are then quicker as matrices."""
_ROW_DTYPES = (torch.float32, torch.bfloat16, *SCALED_DTYPES)


def whole_layer(layer: WholeLayer | DenseLayer) -> Callable[[Tensor], Tensor | None] | None:
    """As `api.whole_layer`, for plain contiguous tensors on a CPU, in float32 but for the rows of experts."""
    if not native.joins_calls() or not all(map(is_plain, layer.tensors())):
        return None
    if isinstance(layer, DenseLayer):
        gate = None if layer.gate is None else layer.gate.detach()
        dense = native.module.dense_layer(layer.down.detach(), gate, layer.up.detach(), layer.activation)
        return FewTokens(dense, layer.down.shape[1], DENSE_TOKENS)
    rows = layer.rows
    if not (rows.is_cpu and rows.dtype in _ROW_DTYPES and rows.is_contiguous() and has_values(rows)):
        return None
    experts = native.module.whole_layer(
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
        as_bytes(rows.detach()),
        layer.scales,
        layer.activation,
    )
    return FewTokens(experts, width(rows), MOST_TOKENS)


def is_plain(tensor: Tensor) -> bool:
    """Whether native code may read a tensor as float32 numbers, one behind the other."""
    return tensor.is_cpu and tensor.dtype == torch.float32 and tensor.is_contiguous() and has_values(tensor)


class FewTokens:
    """A native layer: what it makes of up to `most` tokens of a width.

    Attributes:
        native: the layer in `_native`.
    """

    def __init__(self, layer: Any, dim: int, most: int):
        self.native = layer
        self._run, self._dim, self._most = layer.run, dim, most

    def __call__(self, x: Tensor) -> Tensor | None:
        """As `api.whole_layer` says."""
        tokens = x.numel() // self._dim
        if x.shape[-1:] != (self._dim,) or not 0 < tokens <= self._most or not is_plain(x):
            return None
        y = torch.empty_like(x)
        self._run(x.data_ptr(), tokens, torch.get_num_threads(), y.data_ptr())
        return y
