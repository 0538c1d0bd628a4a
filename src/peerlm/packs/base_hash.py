"""Which model a pack belongs to: a hash of the weights, read from memory."""

import hashlib
import json
from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from peerlm.layers import PEER
from peerlm.ops.row_updates import is_watched
from peerlm.packs.beside import PacksBeside

_CHUNK_BYTES = 2**26
_digests = WeakIdKeyDictionary()
"""By tensor: what it was like when it was read, and its digest."""


def base_hash(model: nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of a model's state dict, and the settings of its PEER layers.

    Packs are not in it, where the tensors lie does not matter. Digests of tensors are kept while their versions do not
    change; writing through `tensor.data` does not change a version.
    """
    state: dict[str, Tensor] = model.state_dict()
    lasting = dict(chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)))
    whole = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        digest = _digest(tensor, lasting.get(name, tensor))
        whole.update(json.dumps([name, str(tensor.dtype), list(tensor.shape), digest]).encode())
    for name, layer in own_peer_layers(model).items():
        whole.update(json.dumps([name, *_settings(layer)]).encode())
    return whole.hexdigest()


def own_peer_layers(model: nn.Module) -> dict[str, PEER]:
    """The PEER layers of the model itself by their paths, without those of packs."""
    packs = [path for path, module in model.named_modules() if isinstance(module, PacksBeside)]
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, PEER) and not any(path.startswith(f"{each}.") for each in packs)
    }


def _settings(layer: PEER) -> tuple[object, ...]:
    """What a layer computes besides its weights."""
    index = layer.product_keys
    return (
        index.heads,
        index.experts_per_head,
        index.weighting,
        index.pairing,
        type(index.query_norm).__name__,
        index.key_norm,
        layer.experts.activation,
        layer.weight_scale,
    )


def _digest(tensor: Tensor, lasting: Tensor) -> str:
    """Of a tensor of a state dict, kept for the parameter or buffer that it is of."""
    seen = None if tensor.is_inference() else (tensor._version, tensor.data_ptr(), tensor.dtype, tensor.shape)
    if seen is not None and not is_watched(lasting) and (known := _digests.get(lasting)) and known[0] == seen:
        return str(known[1])
    digest = hashlib.sha256()
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for chunk in flat.split(_CHUNK_BYTES):
        digest.update(memoryview(chunk.cpu().numpy()))
    if seen is not None:
        _digests[lasting] = seen, digest.hexdigest()
    return digest.hexdigest()
