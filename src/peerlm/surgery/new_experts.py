"""What experts that are added to a trained layer start as: their rows and their sub-keys."""

import math

import torch
from torch import Tensor

from peerlm.layers import ExpertTable, ProductKeys
from peerlm.layers.expert_table import quantise
from peerlm.ops.pairing import PAIRINGS

KEYS = ("random", "crowded")
_ROWS_AT_ONCE = 1024


def fill_new_rows(
    experts: ExpertTable, rows: Tensor, scales: Tensor | None, first: int, generator: torch.Generator
) -> None:
    """Write rows first, first + 1, ... of a table: u and, if gated, g as at initialisation, v zero.

    Args:
        experts: the layer's table, for its sizes.
        rows: (N, 2 or 3, dim), of its format, written in place; so are the scales (N, 2 or 3) of int8 rows.
        first: the first row that is new.
        generator: on the CPU.
    """
    for begin in range(first, len(rows), _ROWS_AT_ONCE):
        part = slice(begin, min(begin + _ROWS_AT_ONCE, len(rows)))
        rows[part, 1] = 0
        if scales is not None:
            scales[part, 1] = 0
        for vector in (0, 2) if experts.gated else (0,):
            fresh = torch.empty(part.stop - begin, experts.dim).normal_(std=experts.dim**-0.5, generator=generator)
            if scales is None:
                rows[part, vector] = fresh.to(rows)
            else:
                whole, scale = quantise(fresh[:, None])
                rows[part, vector], scales[part, vector] = whole[:, 0].to(rows.device), scale[:, 0].to(scales.device)


def new_sub_keys(
    index: ProductKeys, count: int, how: str, usage: Tensor | None, noise: float, generator: torch.Generator
) -> Tensor:
    """Sub-keys (2, H or 1, count, key_dim / 2) to be added to an index, in the dtype and on the device of its own.

    Args:
        index: the layer's index before it grows.
        count: how many for each half.
        how: "random", as at initialisation; or "crowded", near the old ones used most: the most used one first,
            then the next, over and over if there are more new ones than old.
        usage: of "crowded", how often each expert was retrieved, (N,) or by head (H, N).
        noise: of "crowded", the standard deviation of what is added to each feature, in root mean squares of the
            features of the half's old sub-keys.
        generator: on the CPU.
    """
    old = index.sub_keys.detach()
    halves, sets, n, size = old.shape
    shape = (halves, sets, count, size)
    if how == "random":
        bound = size**-0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=generator).to(old)
    assert usage is not None
    used = usage.detach().double().cpu()
    if used.ndim == 1 or sets == 1:
        used = used.reshape(-1, used.shape[-1]).sum(dim=0, keepdim=True).expand(sets, -1)
    of_half = torch.stack(
        [
            used.new_zeros(sets, n).index_add_(1, sub_keys, used)
            for sub_keys in PAIRINGS[index.pairing].sub_keys(torch.arange(n * n), n)
        ]
    )
    ranked = of_half.argsort(dim=-1, descending=True, stable=True)[..., torch.arange(count) % n]
    near = old.gather(2, ranked.to(old.device)[..., None].expand(shape))
    spread = old.double().square().mean(dim=(-2, -1), keepdim=True).sqrt() * noise
    return near + (torch.randn(shape, generator=generator).to(old.device) * spread).to(old)


def check_new_sub_keys(index: ProductKeys, name: str, how: str, usage: Tensor | None, noise: float) -> None:
    """Raise a ValueError where `new_sub_keys` cannot do this; the message calls the index `name`."""
    if how not in KEYS:
        raise ValueError(f"keys is {how!r}; choose one of {', '.join(KEYS)}")
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise is {noise}; take a number of at least 0")
    if how == "random":
        return
    if usage is None:
        raise ValueError(
            f"keys is 'crowded', but usage has no counts of {name!r}: measure them (peerlm.metrics.record_usage), or "
            "take keys='random'"
        )
    shapes = [(index.num_experts,), (index.heads, index.num_experts)]
    if tuple(usage.shape) not in shapes:
        raise ValueError(
            f"usage of {name!r} has shape {tuple(usage.shape)}; give one count for each expert, {shapes[0]}, or for "
            f"each head and expert, {shapes[1]}"
        )
    if not bool((usage >= 0).all() & usage.isfinite().all() & (usage > 0).any()):
        raise ValueError(f"usage of {name!r} must be numbers of at least 0, not all of them 0")
