"""What sub-keys that are added to a trained layer start as."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from peerlm.growth.indexed import IndexedLayer
from peerlm.ops.pairing import PAIRINGS

KEYS = ("random", "crowded", "data")


def new_sub_keys(
    layer: IndexedLayer,
    count: int,
    how: str,
    usage: Mapping[str, Tensor] | None,
    queries: Mapping[str, Tensor] | None,
    noise: float,
    generator: torch.Generator,
) -> Tensor:
    """Sub-keys (2, H or 1, count, key_dim / 2) to be added to an index, in the dtype and on the device of its own.

    Args:
        layer: the layer before it grows.
        count: how many for each half.
        how: "random", as at initialisation; "crowded", near the old ones used most: the most used one first, then the
            next, over and over if there are more new ones than old; or "data", queries chosen at random.
        usage, queries, noise: as `grow` takes them.
        generator: on the CPU.
    """
    old = layer.index.sub_keys.detach()
    halves, sets, n, size = old.shape
    shape = (halves, sets, count, size)
    scale_of_old = old.double().square().mean(dim=(-2, -1), keepdim=True).sqrt()
    if how == "random":
        bound = size**-0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=generator).to(old)
    if how == "data":
        assert queries is not None
        query = queries[layer.index_name].detach().double().unflatten(-1, (2, size))  # (T, H, 2, C)
        each = query.permute(2, 1, 0, 3) if sets > 1 else query.flatten(0, 1).permute(1, 0, 2)[:, None]
        tokens = torch.randint(each.shape[2], (halves, sets, count), generator=generator).to(each.device)
        near = each.gather(2, tokens[..., None].expand(shape))
        scale = scale_of_old.to(near.device) / near.square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-30)
        return (near * scale).to(old)
    assert usage is not None
    used = usage[layer.index_name].detach().double().cpu()
    if used.ndim == 1 or sets == 1:
        used = used.reshape(-1, used.shape[-1]).sum(dim=0, keepdim=True).expand(sets, -1)
    ranked = usage_of_sub_keys(layer, used).argsort(dim=-1, descending=True, stable=True)[..., torch.arange(count) % n]
    near = old.gather(2, ranked.to(old.device)[..., None].expand(shape))
    return near + (torch.randn(shape, generator=generator).to(old.device) * (scale_of_old * noise)).to(old)


def usage_of_sub_keys(layer: IndexedLayer, usage: Tensor) -> Tensor:
    """How often each sub-key took part, (2, S, n) float64, from how often each expert was retrieved, (S, N)."""
    n = layer.index.sub_keys.shape[2]
    halves = PAIRINGS[layer.index.pairing].sub_keys(torch.arange(n * n), n)
    used = usage.double().cpu()
    return torch.stack([used.new_zeros(len(used), n).index_add_(1, sub_keys, used) for sub_keys in halves])


def check_keys(how: str) -> None:
    """Raise a ValueError where there is no such way to choose new sub-keys."""
    if how not in KEYS:
        raise ValueError(f"keys is {how!r}; choose one of {', '.join(KEYS)}")


def check_new_sub_keys(
    layer: IndexedLayer,
    how: str,
    usage: Mapping[str, Tensor] | None,
    queries: Mapping[str, Tensor] | None,
    noise: float,
) -> None:
    """Raise a ValueError where `new_sub_keys` cannot do this."""
    check_keys(how)
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise is {noise}; take a number of at least 0")
    if how == "crowded":
        check_usage(layer, usage, "keys is 'crowded'", "take keys='random'")
    if how == "data":
        given = (queries or {}).get(layer.index_name)
        if given is None:
            raise ValueError(
                f"keys is 'data', but queries has none of {layer.index_name!r}: collect them (ProductKeys.query), or "
                "take keys='random'"
            )
        expected = (layer.index.heads, layer.index.key_dim)
        if given.ndim != 3 or tuple(given.shape[1:]) != expected or not len(given) or not given.isfinite().all():
            raise ValueError(
                f"queries of {layer.index_name!r} have shape {tuple(given.shape)}; give finite ones of tokens, (T, "
                f"{expected[0]}, {expected[1]})"
            )


def check_usage(layer: IndexedLayer, usage: Mapping[str, Tensor] | None, why: str, otherwise: str) -> Tensor:
    """The counts of one layer's experts, (N,) or (H, N); raises a ValueError where there are none or they are none."""
    given, index = (usage or {}).get(layer.index_name), layer.index
    if given is None:
        raise ValueError(
            f"{why}, but usage has no counts of {layer.index_name!r}: measure them (peerlm.usage.record_usage), or "
            f"{otherwise}"
        )
    shapes = [(index.num_experts,), (index.heads, index.num_experts)]
    if tuple(given.shape) not in shapes:
        raise ValueError(
            f"usage of {layer.index_name!r} has shape {tuple(given.shape)}; give one count for each expert, "
            f"{shapes[0]}, or for each head and expert, {shapes[1]}"
        )
    if not bool((given >= 0).all() & given.isfinite().all() & (given > 0).any()):
        raise ValueError(f"usage of {layer.index_name!r} must be numbers of at least 0, not all of them 0")
    return given
