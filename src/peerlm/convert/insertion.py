"""Put layers beside a model's feed-forward layers or in their place, and take them away."""

from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peerlm.convert.ffws import FFW
from peerlm.convert.hooks import remove_hooks
from peerlm.convert.token_mask import TokenMask, stop_watching

CHILD = "peer"
"""The name of the added module, below that at a site's path."""


@dataclass(frozen=True, kw_only=True)
class FFWSite:
    """A feed-forward layer of a model as its configuration records it: plain values."""

    path: str
    """As in `FFW`."""
    first: str | None
    """Of a layer spread over its block: the path of the map that reads; otherwise None."""
    activation_path: str | None
    dim: int
    hidden: int
    activation: str
    gated: bool
    biases: bool
    """Whether its neurons have biases."""
    output_bias: bool

    @classmethod
    def of(cls, ffw: FFW) -> "FFWSite":
        """The record of a layer that was found."""
        return cls(
            path=ffw.path,
            first=ffw.down.path if ffw.spread else None,
            activation_path=ffw.activation_path,
            dim=ffw.dim,
            hidden=ffw.hidden,
            activation=ffw.activation,
            gated=ffw.gated,
            biases=ffw.down.bias is not None or (ffw.gate is not None and ffw.gate.bias is not None),
            output_bias=ffw.up.bias is not None,
        )


class InPlaceOfFFW(nn.Module):
    """Stands where a feed-forward layer stood, and gives its successor the mask of real tokens."""

    def __init__(self, layer: nn.Module, masks: TokenMask):
        super().__init__()
        self.add_module(CHILD, layer)
        self._masks = masks

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map (..., dim) to (..., dim); what else the model passes to its feed-forward layers is not needed."""
        layer = self.get_submodule(CHILD)
        return layer(hidden_states, self._masks.of(hidden_states)).to(hidden_states.dtype)


class _AddLayer:
    """A hook on the last module of a feed-forward layer: adds what the layer beside it makes of the same input."""

    def __init__(self, child: str, masks: TokenMask | None, reader: "_KeepInput | None"):
        self.child = child
        self.masks = masks
        self.reader = reader

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x = _first(args, kwargs) if self.reader is None else self.reader.take()
        beside = module.get_submodule(self.child)(x, None if self.masks is None else self.masks.of(x))
        if beside is None:
            return output
        # output + beside, but a zero of either sign leaves every bit of the output: -0.0 + 0.0 would be 0.0.
        return output - (0.0 - beside.to(output.dtype).reshape(output.shape))


class _KeepInput:
    """A hook on the first map of a layer that is spread over its block: keeps the input for the last one.

    Of each thread its own; a `threading.local` could be neither copied nor pickled with the model.
    """

    def __init__(self, child: str) -> None:
        self.child = child
        self.x_by_thread: dict[int, Tensor] = {}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.x_by_thread[_thread()] = _first(args, kwargs)

    def take(self) -> Tensor:
        return self.x_by_thread.pop(_thread())  # the first map has run, or the last would have nothing to read


def _thread() -> int:
    """The thread that runs; torch.compile, which cannot ask for it, has the two hooks in one graph."""
    return 0 if torch.compiler.is_compiling() else get_ident()


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x


def put_beside(model: PreTrainedModel, layers: dict[FFWSite, nn.Module]) -> None:
    """Add each layer to the output of the feed-forward layer at its site; nothing else changes, names neither."""
    masks = TokenMask()
    for site, layer in layers.items():
        add_beside(model, site.path, site.first, layer, masks=masks)
    masks.watch(model, [_path_in(model, site.path) for site in layers])


def add_beside(
    model: nn.Module, path: str, first: str | None, layer: nn.Module, *, child: str = CHILD, masks: TokenMask | None
) -> None:
    """Add to the output of one feed-forward layer what `layer(x, mask)` makes of its input; None adds nothing.

    Args:
        model: a model.
        path, first: of the feed-forward layer, as in `FFWSite`.
        layer: becomes a module of the feed-forward layer, by the name `child`.
        child: that name.
        masks: where the mask of real tokens is found; None: the layer gets None.
    """
    module, reader = find_module(model, path), None
    if first is not None:
        reader = _KeepInput(child)
        find_module(model, first).register_forward_pre_hook(reader, with_kwargs=True)
    module.add_module(child, layer)
    module.register_forward_hook(_AddLayer(child, masks, reader), with_kwargs=True)


def take_from_beside(model: nn.Module, path: str, first: str | None, *, child: str = CHILD) -> None:
    """Undo `add_beside`."""
    module = find_module(model, path)
    delattr(module, child)
    remove_hooks(module, _AddLayer, lambda hook: hook.child == child)
    if first is not None:
        remove_hooks(find_module(model, first), _KeepInput, lambda hook: hook.child == child)


def put_in_place(model: PreTrainedModel, layers: dict[FFWSite, nn.Module]) -> None:
    """Put each layer where the feed-forward layer at its site stands, which goes."""
    masks = TokenMask()
    for site, layer in layers.items():
        if site.first is not None:  # the hidden states pass unchanged to where the last map stood
            for path in (site.first, site.activation_path):
                assert path is not None  # `check_replaceable`
                model.set_submodule(_path_in(model, path), nn.Identity())
        model.set_submodule(_path_in(model, site.path), InPlaceOfFFW(layer, masks))
    masks.watch(model, [_path_in(model, site.path) for site in layers])


def replaced_modules(model: PreTrainedModel, sites: list[FFWSite]) -> dict[str, nn.Module]:
    """The modules that `put_in_place` will replace, by path."""
    paths = [path for site in sites for path in (site.path, site.first, site.first and site.activation_path)]
    found = {path: _path_in(model, path) for path in paths if path is not None}
    return {path: model.get_submodule(path) for path in found.values()}


def put_back(model: PreTrainedModel, modules: dict[str, nn.Module]) -> None:
    """Undo `put_in_place` with what `replaced_modules` gave before."""
    for path, module in modules.items():
        model.set_submodule(path, module)
    stop_watching(model)


def check_replaceable(site: FFWSite) -> None:
    """Raise a ValueError where the feed-forward layer at this site cannot be taken out of its block."""
    if site.first is not None and (site.gated or site.activation_path is None):
        reason = "is gated" if site.gated else "calls its activation as a function"
        raise ValueError(
            f"the feed-forward layer that ends at {site.path} is spread over its block and {reason}, "
            'so that it cannot be replaced; convert with mode="beside"'
        )


def remove_beside(model: PreTrainedModel, sites: list[FFWSite]) -> None:
    """Undo `put_beside`."""
    for site in sites:
        take_from_beside(model, site.path, site.first)
    stop_watching(model)


def find_module(model: nn.Module, path: str) -> nn.Module:
    """The module of a recorded path, in the model that was converted or in one with another head or none."""
    return model.get_submodule(_path_in(model, path))


def _path_in(model: nn.Module, path: str) -> str:
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for candidate in (path, path.removeprefix(prefix), prefix + path):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    raise ValueError(
        f"{type(model).__name__} has no module {path}, which the configuration records as converted; "
        "load the model with the class that was converted"
    )
