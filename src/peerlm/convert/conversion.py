"""PEER beside a model's feed-forward layers, or in their place."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from peerlm.convert.ffws import FFW, mixture_sentence, survey
from peerlm.convert.insertion import (
    FFWSite,
    check_replaceable,
    put_back,
    put_beside,
    put_in_place,
    remove_beside,
    replaced_modules,
)
from peerlm.convert.kinds import KINDS, Kind
from peerlm.convert.neurons import fit_neurons
from peerlm.convert.record import (
    MODES,
    ConversionConfig,
    conversion_of,
)


def convert(
    model: PreTrainedModel,
    *,
    mode: str = "beside",
    layers: str | int | Sequence[int] | None = None,
    init: str = "random",
    inputs: Mapping[str, Any] | None = None,
    samples: Iterable[Mapping[str, Any]] | None = None,
    fit: Mapping[str, Any] | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """Put PEER beside a model's dense feed-forward layers or in their place; in place, and returned.

    The model stays what it was to transformers: it trains, generates, is saved and, after `import peerlm`,
    loaded by the same classes; its configuration records the conversion. PEER's weights have the dtype and device of
    the feed-forward layer, tables too (unless row_format says "bfloat16"); padding, where the model is called with a
    2-D attention mask, does not enter the statistics of queries.

    Args:
        model: any transformers model with dense feed-forward layers in its blocks, plain or gated; the whole model that
            is to be saved, not a part of it.
        mode: "beside": y = ffw(x) + peer(x), where peer(x) is exactly zero before training, so that the model's
            output keeps its bits. "replace": y = peer(x), at the start of the scale of ffw(x) on random tokens.
        layers: which of `find_ffws(model)`: None for all, "middle", or indices, of which negative ones count from
            the end. In a model whose every block has a dense layer, these are the numbers of blocks.
        init: what is built, a name in `peerlm.convert.kinds.KINDS`: "random" is PEER with random experts; "neurons",
            with mode="replace", has the layer's own neurons as experts, and an index of them that is learned from
            samples (`peerlm.convert.neurons`).
        inputs: keyword arguments of a forward pass that finds the layers; needed by few models (`find_ffws`).
        samples: of init="neurons": keyword arguments of forward passes on text like that which the model is for, such
            as {"input_ids": ...}; a few ten thousand tokens in all.
        fit: how the index is learned, keyword arguments of `fit_neurons`: steps, max_tokens, seed, report,
            learned.
        settings: PEER's own, such as num_experts=128**2, the rest as PEER has it, which is 1024**2 experts for each
            layer where nothing is said, 4 GB at width 512 in float32; of init="neurons" those of
            `NeuronLayer`, such as share=0.35, and pool=True for one table that all layers share.

    Raises:
        ValueError: the model was converted before, is quantised or not all in memory, has no dense feed-forward layer
            or mixtures of experts; a layer does not exist or cannot be replaced; a setting is unknown or impossible;
            samples are missing, or there are none. The model is then as it was.
        FloatingPointError: an index could not be learned; the model is as it was.
    """
    kind = kind_named(init, mode=mode, settings=settings, has_samples=samples is not None)
    if conversion_of(model) is not None:
        raise ValueError(
            f"{type(model).__name__} is converted already; unconvert(model) first, on the command line --undo, or take "
            "the original"
        )
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(f"{type(model).__name__} is quantised; convert it before, from its weights in full precision")
    absent = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if absent is not None:
        raise ValueError(f"{type(model).__name__} has weights that are not in memory, such as {absent}; load it whole")
    found, mixtures = survey(model, inputs)
    if mixtures and (layers is None or layers == "middle"):
        raise ValueError(mixture_sentence(model, mixtures))
    ffws = _choose(model, found, layers)
    sites = [FFWSite.of(ffw) for ffw in ffws]
    if mode == "replace":
        for site in sites:
            check_replaceable(site)
    built = {}
    for site, ffw in zip(sites, ffws, strict=True):
        module: Any = ffw.up.module
        with _weights_like(module.weight):
            built[site] = kind.build(ffw, mode, settings).train(module.training)
    kind.finish(list(built.values()), settings)
    before = replaced_modules(model, sites) if mode == "replace" else {}
    (put_beside if mode == "beside" else put_in_place)(model, built)
    if samples is not None:
        try:
            fit_neurons(model, samples, **(fit or {}))
        except BaseException:
            put_back(model, before)
            raise
    _own_config(model)
    model.config.quantization_config = ConversionConfig.of(mode, init, dict(settings), sites)
    return model


def kind_named(init: str, *, mode: str, settings: Mapping[str, Any], has_samples: bool) -> Kind:
    """The kind of layer that `convert` builds; a ValueError where these arguments of it do not go together."""
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; choose one of {', '.join(MODES)}")
    kinds = [name for name, kind in KINDS.items() if mode in kind.modes]
    if init not in kinds:
        raise ValueError(f"init is {init!r}; with mode={mode!r} choose one of {', '.join(kinds)}")
    kind = KINDS[init]
    kind.check(settings)
    if kind.learns_index != has_samples:
        fix = (
            "pass samples=, arguments of forward passes, or on the command line --text FILE"
            if kind.learns_index
            else "leave samples out, or on the command line --text"
        )
        raise ValueError(f"init={init!r} {'learns' if kind.learns_index else 'does not learn'} from samples; {fix}")
    return kind


def unconvert(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `convert` with mode="beside": layers, configuration and names are again what they were.

    Raises:
        ValueError: the model was not converted, or with mode="replace".
    """
    record = conversion_of(model)
    if record is None:
        raise ValueError(f"{type(model).__name__} is not converted; there is nothing to undo")
    if record.mode != "beside":
        raise ValueError(
            f"the feed-forward layers of this {type(model).__name__} were replaced and are gone; take the model that "
            'was converted, or convert with mode="beside"'
        )
    remove_beside(model, record.read_sites())
    del model.config.quantization_config
    return model


def _own_config(model: PreTrainedModel) -> None:
    """Give the model a copy of its configuration: other models may have been made of the same one."""
    shared, own = model.config, copy.copy(model.config)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own  # type: ignore[assignment]


def _choose(model: nn.Module, ffws: list[FFW], layers: str | int | Sequence[int] | None) -> list[FFW]:
    if layers is None:
        return ffws
    if layers == "middle":
        return [ffws[len(ffws) // 2]]
    indices = [layers] if isinstance(layers, int) else layers
    if isinstance(indices, str) or not indices or not all(type(index) is int for index in indices):
        raise ValueError(f"layers is {layers!r}; give numbers of layers, 'middle', or None for all")
    for index in indices:
        if not -len(ffws) <= index < len(ffws):
            raise ValueError(
                f"layers has {index}, but {type(model).__name__} has {len(ffws)} dense feed-forward layers; "
                f"take numbers from 0 to {len(ffws) - 1}"
            )
    return [ffws[index] for index in sorted({index % len(ffws) for index in indices})]


@contextmanager
def _weights_like(weight: torch.Tensor) -> Iterator[None]:
    """New parameters have this tensor's dtype and device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(weight.dtype)
    try:
        with torch.device(weight.device):
            yield
    finally:
        torch.set_default_dtype(before)
