"""Token ids of earlier calls in a model's cache, for layers that look up by them."""

from typing import cast

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer, StaticLayer

from peerlm.layers.hashed_ngrams import preceding


def preceding_tokens(input_ids: Tensor, count: int, follows: Tensor, cache: Cache | None, layer_idx: int) -> Tensor:
    """Each new token's id and those before it, also of earlier calls: (B, S, count), -1 where its text has none.

    Ids lie in the cache as one layer more, behind those of attention. So whatever is done to the tokens of a cache
    (cut, reorder, repeat) is done to these too.

    Args:
        input_ids: (B, S), new tokens.
        count: how many, the token's own included.
        follows: (B or 1, S) bool, whether the token before belongs to the same text.
        cache: of attention; it is changed.
        layer_idx: the number of this layer, that of attention layers.
    """
    follows = follows.expand_as(input_ids)
    if cache is None:
        return preceding(input_ids, count, follows)
    layer = _layer(cache, layer_idx)
    past = 0 + layer.get_seq_length()  # a static layer counts in place
    ids, linked = layer.update(input_ids[:, None, :, None], follows.long()[:, None, :, None])
    return preceding(ids[:, 0, :, 0], count, linked[:, 0, :, 0].bool(), past, input_ids.shape[1])


def _layer(cache: Cache, layer_idx: int) -> DynamicLayer | StaticLayer:
    while len(cache.layers) < layer_idx and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    if len(cache.layers) == layer_idx:
        first = cache.layers[0]
        own = StaticLayer(max_cache_len=first.max_cache_len) if isinstance(first, StaticLayer) else DynamicLayer()
        cache.layers.append(own)
    return cast(DynamicLayer | StaticLayer, cache.layers[layer_idx])
