"""Weights of other packages' PEER layers, as ours: their names, the order of their axes, and what they leave unsaid."""

from typing import Any

import torch
from torch import Tensor, nn

from peerlm.layers import PEER

SUB_KEY_LAYOUTS = {"peerlm": "phnd", "PEER-pytorch": "hnpd"}
"""Order of the axes of sub-keys: p halves, h heads, n sub-keys per half, d half of key_dim."""
QUERY_LAYOUTS = {"peerlm": "hpd", "PEER-pytorch": "phd"}
"""Order of the features of a query, rows of its map: axes as of sub-keys."""

_ACTIVATIONS = {nn.GELU: "gelu", nn.ReLU: "relu", nn.SiLU: "silu", nn.Identity: "identity"}


def arrange_sub_keys(sub_keys: Tensor, layout: str) -> Tensor:
    """Sub-keys (2, heads or 1, n, key_dim / 2) from those whose axes have another order.

    Args:
        sub_keys: any order of these axes; three axes where heads share them.
        layout: a name in `SUB_KEY_LAYOUTS`, or letters for the axes, such as "hnpd", without h where there are three.

    Raises:
        ValueError: the layout does not fit the tensor.
    """
    letters = SUB_KEY_LAYOUTS.get(layout, layout)
    if sorted(letters) not in (sorted("phnd"), sorted("pnd")) or len(letters) != sub_keys.ndim:
        raise ValueError(
            f"layout is {layout!r} for sub-keys of shape {tuple(sub_keys.shape)}; name each axis once, of p (halves), "
            f"h (heads), n (sub-keys) and d (half of key_dim), or take one of {', '.join(SUB_KEY_LAYOUTS)}"
        )
    halves = sub_keys.shape[letters.index("p")]
    if halves != 2:
        raise ValueError(f"layout is {layout!r}, but axis p of {tuple(sub_keys.shape)} is {halves}, not 2")
    if "h" not in letters:
        letters, sub_keys = f"h{letters}", sub_keys[None]
    return sub_keys.permute([letters.index(axis) for axis in "phnd"]).contiguous()


def arrange_query(weight: Tensor, layout: str, *, heads: int) -> Tensor:
    """The weight (heads * key_dim, dim) of a query map from one whose features have another order.

    Args:
        weight: (heads * key_dim, dim).
        layout: a name in `QUERY_LAYOUTS`, or a permutation of "hpd".
        heads: queries per token.

    Raises:
        ValueError: the layout is unknown, or the weight is not of `heads` queries of two halves.
    """
    letters = QUERY_LAYOUTS.get(layout, layout)
    if sorted(letters) != sorted("hpd"):
        raise ValueError(f"layout is {layout!r}; take an order of 'hpd', or one of {', '.join(QUERY_LAYOUTS)}")
    features, dim = weight.shape
    if features % (2 * heads):
        raise ValueError(f"the query map has {features} features, which are not {heads} heads of two equal halves")
    sizes = {"h": heads, "p": 2, "d": features // (2 * heads)}
    axes = weight.view(*(sizes[letter] for letter in letters), dim)
    return axes.permute(*(letters.index(axis) for axis in "hpd"), 3).reshape(features, dim)


def from_peer_pytorch(layer: nn.Module, *, backend: str = "auto") -> PEER:
    """Our layer with the weights and the output of a `PEER` of the package PEER-pytorch (0.2).

    With that package's default, non_competing_scores=True, each head retrieves one expert, not
    num_experts_per_head says; so does what is returned.

    Args:
        layer: theirs; its weights are copied.
        backend: as of `PEER`.

    Raises:
        ValueError: the layer is something else, or has what ours has not: its own RMSNorm, experts of its own for each
            head, an activation that we lack, or fewer candidates per half than experts per head.
    """
    theirs: Any = layer
    names = ("weight_down_embed", "weight_up_embed", "to_queries", "keys", "product_key_topk", "score_activation")
    missing = [name for name in names if not hasattr(layer, name)]
    if missing:
        raise ValueError(f"{type(layer).__name__} is no PEER of PEER-pytorch, for it lacks {missing[0]}")
    k = theirs.num_experts_per_head_topk
    if theirs.separate_embed_per_head:
        raise ValueError("separate_embed_per_head is True; here all heads share one pool of experts")
    if not isinstance(theirs.norm, nn.Identity):
        raise ValueError("pre_rmsnorm is True; take the norm out, and put an nn.RMSNorm before the layer")
    activation = _ACTIVATIONS.get(type(theirs.activation))
    if activation is None:
        known = ", ".join(each.__name__ for each in _ACTIVATIONS)
        raise ValueError(f"the activation is {theirs.activation}; layers with one of {known} can be taken")
    if getattr(theirs.activation, "approximate", "none") == "tanh":
        activation = "gelu_tanh"
    if theirs.product_key_topk < k:
        raise ValueError(f"product_key_topk is {theirs.product_key_topk}, less than the {k} experts of a head")
    heads, n, _, half = theirs.keys.shape
    ours = PEER(
        theirs.weight_down_embed.embedding_dim,
        num_experts=n * n,
        heads=heads,
        experts_per_head=k,
        key_dim=2 * half,
        shared_keys=False,
        query_norm="none",
        weighting="softmax" if isinstance(theirs.score_activation, nn.Softmax) else "relu",
        activation=activation,
        dropout=theirs.dropout.p,
        backend=backend,
    )
    with torch.no_grad():
        ours.product_keys.query_proj.weight.copy_(
            arrange_query(theirs.to_queries[0].weight, "PEER-pytorch", heads=heads)
        )
        ours.product_keys.sub_keys.copy_(arrange_sub_keys(theirs.keys, "PEER-pytorch"))
        ours.experts.write(theirs.weight_down_embed.weight, vector=0)
        ours.experts.write(theirs.weight_up_embed.weight, vector=1)
    return ours.train(layer.training)
