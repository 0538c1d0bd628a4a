"""The kinds of layer that a conversion can build, by the names that `convert` takes as `init`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from peerlm.convert.ffws import FFW
from peerlm.convert.insertion import FFWSite
from peerlm.convert.neurons import neuron_layer, neuron_layer_skeleton, pool_tables
from peerlm.convert.neurons.layer import check_neuron_settings
from peerlm.layers import PEER
from peerlm.layers.checks import check_settings
from peerlm.layers.modes import evaluating


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How a layer is made, with keyword arguments that are plain values."""

    build: Callable[[FFW, str, dict[str, Any]], nn.Module]
    """From the feed-forward layer that it stands for, and the mode of the conversion."""
    skeleton: Callable[[FFWSite, dict[str, Any]], nn.Module]
    """The same layer before its weights are loaded."""
    modes: tuple[str, ...]
    check: Callable[[Mapping[str, Any]], None]
    """Raises a ValueError where a setting is unknown."""
    finish: Callable[[list[Any], Mapping[str, Any]], None] = lambda layers, settings: None
    """Done with all layers of a model, built or skeletons, before they stand in it."""
    learns_index: bool = False
    """Whether the index is learned from samples after the layers stand in the model."""


def _random_peer(ffw: FFW, mode: str, settings: dict[str, Any]) -> PEER:
    """PEER whose output is zero beside a layer, or of the scale of the layer that it replaces."""
    peer = PEER(ffw.dim, **settings)
    if not peer.experts.has_gradients:
        raise ValueError(
            f"row_format is {peer.experts.row_format!r}, whose rows are not trained; choose 'float32' or 'bfloat16'"
        )
    up = peer.experts.up.detach()
    if mode == "beside":
        factor = 0.0
    else:
        with evaluating(peer):
            scale = peer(ffw.sample_input.to(up)).float().norm().item()
        factor = ffw.sample_output.float().norm().item() / scale
    peer.experts.write(up * factor, vector=1)
    return peer


def _without_pool(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of each layer: `pool` is one of them all."""
    return {name: value for name, value in settings.items() if name != "pool"}


KINDS = {
    "random": Kind(
        build=_random_peer,
        skeleton=lambda site, settings: PEER(site.dim, **settings),
        modes=("beside", "replace"),
        check=partial(check_settings, PEER, "PEER"),
    ),
    "neurons": Kind(
        build=lambda ffw, mode, settings: neuron_layer(ffw.neurons(), _without_pool(settings)),
        skeleton=lambda site, settings: neuron_layer_skeleton(
            site.dim, site.hidden, site.activation, site.gated, site.biases, _without_pool(settings)
        ),
        modes=("replace",),
        check=lambda settings: check_neuron_settings(_without_pool(settings)),
        finish=lambda layers, settings: pool_tables(layers) if settings.get("pool") else None,
        learns_index=True,
    ),
}
"""Each by its name; a new one is one entry."""
