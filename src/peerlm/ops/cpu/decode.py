"""A feed-forward layer for a few tokens in one native call: calls of its parts would take longer than their work."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor

from peerlm.ops.cpu import native
from peerlm.ops.cpu.native import as_bytes
from peerlm.ops.cpu.onednn import linear
from peerlm.ops.row_formats import SCALED_DTYPES, width
from peerlm.ops.tensors import has_values
from peerlm.ops.whole_layer import DenseLayer, WholeLayer

FEW_TOKENS = 4
"""Up to here a layer of experts is one native call, in which sub-keys are read as they are, once for each token."""
SOME_TOKENS = 64
"""Up to here it is two native calls, without those of operators around them."""
DENSE_TOKENS = 8
"""Up to here a dense layer is one native call; its products are quicker as matrices from there on."""
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
    return Experts(experts, layer)


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


class Experts(FewTokens):
    """A native layer of experts, for some tokens more in the steps that the layer itself takes: to the same bits.

    It does not keep the layer's tensors alive.
    """

    def __init__(self, experts: Any, layer: WholeLayer):
        super().__init__(experts, width(layer.rows), FEW_TOKENS)
        self._settings = {f.name: getattr(layer, f.name) for f in fields(layer) if f.name not in _TENSORS}
        self._tensors = {name: _weakly(getattr(layer, name)) for name in _TENSORS}

    def __call__(self, x: Tensor) -> Tensor | None:
        """As `api.whole_layer` says."""
        tokens = x.numel() // self._dim
        if not FEW_TOKENS < tokens <= SOME_TOKENS:
            return super().__call__(x)
        if x.shape[-1:] != (self._dim,) or not is_plain(x):
            return None
        layer = WholeLayer(**self._settings, **{name: there() for name, there in self._tensors.items()})
        return _in_two_calls(layer, x.view(tokens, self._dim)).view(x.shape)


_TENSORS = ("query_map", "norms", "sub_keys", "rows", "scales")
"""The fields of a layer that are tensors, or lists of them."""


def _weakly(tensors: Any) -> Callable[[], Any]:
    """What gives tensors as long as others keep them."""
    if tensors is None:
        return lambda: None
    if isinstance(tensors, Tensor):
        return ref(tensors)
    each = [ref(tensor) for tensor in tensors]
    return lambda: [tensor() for tensor in each]


def _in_two_calls(layer: WholeLayer, x_TD: Tensor) -> Tensor:
    """What a layer makes of tokens (T, D): PyTorch's query and norms, native retrieval and mixing."""
    query_THX, sub_keys, threads = _queries(layer, x_TD), layer.sub_keys, torch.get_num_threads()
    if layer.key_length:
        sub_keys = F.normalize(sub_keys, dim=-1) * layer.key_length
    tokens, heads, key_dim = query_THX.shape
    weights = query_THX.new_empty(tokens, heads, layer.k)
    ids = query_THX.new_empty(tokens, heads, layer.k, dtype=torch.int64)
    native.module.retrieve(
        query_THX.view(tokens, heads, 2, key_dim // 2),
        sub_keys.detach(),
        layer.k,
        layer.weighting,
        layer.pairing,
        "fp32",  # what shortlists are made of changes no bit, and packs quickest
        threads,
        weights,
        ids,
    )
    y_TD = torch.empty_like(x_TD)
    native.module.mix(
        x_TD,
        (weights * layer.weight_scale).view(tokens, -1),
        ids.view(tokens, -1),
        as_bytes(layer.rows.detach()),
        layer.scales,
        layer.activation,
        threads,
        None,
        y_TD,
    )
    return y_TD


def _queries(layer: WholeLayer, x_TD: Tensor) -> Tensor:
    """Normed queries (T, H, 2 C)."""
    key_dim = 2 * layer.sub_keys.shape[3]
    features_TF = linear(x_TD, layer.query_map)
    if layer.norm == "batch":
        mean, variance, weight, bias = layer.norms
        features_TF = F.batch_norm(features_TF, mean, variance, weight, bias, eps=layer.epsilon)
    query_THX = features_TF.view(len(x_TD), -1, key_dim)
    if layer.norm == "layer":
        weight, bias = layer.norms
        query_THX = F.layer_norm(query_THX, (key_dim,), weight, bias, layer.epsilon)
    return query_THX
