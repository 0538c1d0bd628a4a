"""The kinds of layer that a conversion can build, by the names that `convert` takes as `init`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from peerlm.layers import PEER
from peerlm.layers.modes import evaluating
from peerlm.surgery.ffw import FFW
from peerlm.surgery.sites import Site


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How a layer is made, with keyword arguments that are plain values."""

    build: Callable[[FFW, str, dict[str, Any]], nn.Module]
    """From the feed-forward layer that it stands for, and the mode of the conversion."""
    skeleton: Callable[[Site, dict[str, Any]], nn.Module]
    """The same layer before its weights are loaded."""
    modes: tuple[str, ...]


def _random_peer(ffw: FFW, mode: str, settings: dict[str, Any]) -> PEER:
    """PEER whose output is zero beside a layer, or as loud as that of the layer which it replaces."""
    peer = PEER(ffw.dim, **settings)
    if peer.experts.scales is not None:
        raise ValueError("row_format is 'int8', whose rows are not trained; choose 'float32' or 'bfloat16'")
    up = peer.experts.up.detach()
    if mode == "beside":
        up.zero_()
    else:
        with evaluating(peer):
            loudness = peer(ffw.sample_input.to(up)).float().norm().item()
        up.mul_(ffw.sample_output.float().norm().item() / loudness)
    return peer


KINDS = {
    "random": Kind(
        build=_random_peer,
        skeleton=lambda site, settings: PEER(site.dim, **settings),
        modes=("beside", "replace"),
    ),
}
"""Each by its name; a new one is one entry."""
