"""Where the gates of loaded packs open."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peerlm.layers.modes import evaluating
from peerlm.packs.plain import holders


@torch.no_grad()
def openings(model: nn.Module, input_ids: Tensor) -> dict[str, Tensor]:
    """Of each loaded pack beside feed-forward layers the share of its gates that open at each token.

    Args:
        model: with packs; all that are loaded speak.
        input_ids: (batch, length) int64.

    Returns:
        By name, (batch, length) float32, 0 to 1.
    """
    opened: dict[str, list[Tensor]] = {}
    handles = []

    def hook(name: str) -> Callable[..., None]:
        def count(module: nn.Module, args: tuple[Any, ...], share_T: Tensor) -> None:
            opened.setdefault(name, []).append((share_T > 0).float().view(input_ids.shape))

        return count

    for holder in holders(model).values():
        for name, pack in holder.by_name().items():
            handles.append(pack.gate.register_forward_hook(hook(name)))
    try:
        with evaluating(model):
            model(input_ids=input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.stack(parts).mean(dim=0) for name, parts in sorted(opened.items())}
