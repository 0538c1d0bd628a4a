"""Make, save, load, unload and choose packs of experts.

The contract, for whoever serves models with packs. It is the same for models with PEER layers, whose experts a pack
joins, and for all other causal models of transformers, beside whose feed-forward layers a pack is put:

- `load_pack(model, folder, name)` adds a frozen pack between two forward passes, and returns its name. A folder that
  was made for other weights is refused, and nothing is changed. No weight of the model is touched, no module is
  replaced; modules and hooks are added. `unload_pack(model, name)` takes them away: the output has the bits it had.
- `loaded_packs(model)` are the names. All loaded packs count for all sequences, unless `choose_packs(model, names)` is
  entered: then each sequence of a batch (the first dimension of hidden states) has the packs of its own list. A
  sequence with an empty list has the bits that it has in the same batch without any pack.
- Packs hold no state between forward passes, so that caches of keys and values may be cut, copied and joined. Cached
  keys and values were made with the packs of their time: a sequence keeps its packs as long as it keeps its cache.
- Choices and packs belong to a model, not to a thread: forward passes of one model with different choices follow each
  other.
- `state_dict`, `save_pretrained` and the model's hash leave packs out.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peerlm.errors import UserError, listed
from peerlm.growth.indexed import IndexedLayer
from peerlm.growth.new_experts import check_new_sub_keys, new_sub_keys
from peerlm.layers import PEER
from peerlm.layers.product_keys import sub_keys_per_half
from peerlm.layers.row_memory import empty_rows
from peerlm.packs import plain
from peerlm.packs.base_hash import base_hash, own_peer_layers
from peerlm.packs.beside import PackBeside, PacksBeside
from peerlm.packs.choice import CHOICES, check_batch, chosen_at
from peerlm.packs.files import PackManifest, check_pack_name, read_manifest, read_tensors, write_pack
from peerlm.packs.layer import LayerPacks, Pack

ROW_FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@torch.no_grad()
def new_pack(
    model: nn.Module,
    name: str,
    num_experts: int,
    *,
    layers: Sequence[str] | None = None,
    keys: str = "random",
    usage: Mapping[str, Tensor] | None = None,
    queries: Mapping[str, Tensor] | None = None,
    noise: float = 0.1,
    row_format: str = "float32",
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> list[str]:
    """Give a model a new pack to be trained: experts that are retrieved together with its own, or beside its layers.

    Vectors u (and g) are as at initialisation, v are zero. In a model with PEER layers its experts take places of
    others from the start, so that the output changes a little. In any other model it has indices of its own beside
    feed-forward layers, and changes nothing before it is trained; its gates are open (`peerlm.packs.fit`). The
    model's own parameters are not frozen by this. Where they are, which for a query norm of kind "batch" includes its
    statistics, gradients are those of the pack alone.

    Args:
        model: a PEER layer, a model with such layers, or a model of transformers with dense feed-forward layers.
        name: letters, digits, _ and -.
        num_experts: of each layer, a square number; it need not be as large as experts_per_head of the model's layers.
        layers: paths of PEER layers, such as "model.layers.1.ffw", None for all; or of feed-forward layers, None for
            all.
        keys, usage, queries, noise: what sub-keys start as, as in `peerlm.growth.grow`; of PEER layers alone.
        row_format: "float32" (torch's default dtype where that is another), or "bfloat16".
        settings: of the pack's own PEER layers, beside feed-forward layers alone; what is left out is as in
            `peerlm.packs.beside.DEFAULTS`.
        seed: of what is random; the global generator is not used.

    Returns:
        The paths of the layers.

    Raises:
        ValueError: the model has no such layers, or a pack of this name; a setting is impossible. Nothing is changed.
    """
    check_pack_name(name)
    _check_free(model, name)
    n = sub_keys_per_half(num_experts, 1)
    if row_format not in ROW_FORMATS:
        raise ValueError(f"row_format is {row_format!r}; a pack is trained, so choose one of {', '.join(ROW_FORMATS)}")
    generator = torch.Generator().manual_seed(seed)
    if not own_peer_layers(model):
        if keys != "random" or usage is not None or queries is not None:
            raise ValueError(
                f"keys is {keys!r}; {type(model).__name__} has no PEER layer whose sub-keys a pack could be put near: "
                "leave out keys, usage and queries"
            )
        beside = plain.make(model, num_experts, layers, settings or {}, row_format, generator)
        plain.put(model, name, beside)
        return list(beside)
    if settings is not None:
        raise ValueError("settings are of packs beside feed-forward layers; this model's PEER layers have their own")
    dtype = torch.get_default_dtype() if row_format == "float32" else ROW_FORMATS[row_format]
    chosen = _layers_named(model, layers)
    made = {}
    for path, layer in chosen.items():
        indexed, experts = IndexedLayer(name=path, module=layer), layer.experts
        check_new_sub_keys(indexed, keys, usage, queries, noise)
        sub_keys = new_sub_keys(indexed, n, keys, usage, queries, noise, generator)
        rows = empty_rows(num_experts, *experts.row_shape, dtype=dtype, device=experts.device)
        table = experts.like(rows, trained=True)
        table.fill_new(0, generator)
        made[path] = Pack(sub_keys, table, trained=True)
    _put(chosen, name, made)
    return list(chosen)


def pack_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """What training of a pack updates: the sub-keys and rows of each of its layers, and query maps of its own.

    `peerlm.optim.parameter_groups` finds them in the model, in the groups "keys" and "table", where they require
    gradients: those of `new_pack` do, those of `load_pack` do not until `requires_grad_(True)`.

    Raises:
        ValueError: no such pack is loaded.
    """
    return [parameter for pack in _packs(model, name).values() for parameter in pack.parameters()]


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many parameters are trained, of how many, as peft's models do."""
    every = list(model.parameters())
    trained = sum(parameter.numel() for parameter in every if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in every)
    print(  # noqa: T201
        f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / max(total, 1):.4f}"
    )


@torch.no_grad()
def save_pack(
    model: nn.Module,
    name: str,
    folder: str | Path,
    *,
    licence: str | None = None,
    data: Any = None,
    metrics: Mapping[str, Any] | None = None,
) -> PackManifest:
    """Write a loaded pack to a folder: its tensors as safetensors, and manifest.json.

    It belongs to the model as that is now: one that was loaded, after which the model grew, belongs to the grown one
    when it is saved again. A pack that is there already is replaced; killed at any moment, the folder has the old one
    or the new one, whole.

    Args:
        model, name: the pack in memory.
        folder: a new one, or one that has a pack.
        licence: under which it may be used.
        data: what it was trained on, anything that JSON can say.
        metrics: what was measured.

    Raises:
        ValueError: no such pack is loaded, the folder holds something else, or JSON cannot say it.
    """
    packs = _packs(model, name)
    tensors = {
        f"{path}.{part}".lstrip("."): tensor for path, pack in packs.items() for part, tensor in pack.tensors().items()
    }
    one = next(iter(packs.values()))
    beside: dict[str, Any] = {}
    if isinstance(one, PackBeside):
        found = plain.holders(model)
        first = {path: reads for path in packs if (reads := found[path].first) is not None}
        beside = {"settings": one.settings, "first": first or None}
    return write_pack(
        Path(folder),
        tensors,
        name=name,
        base=base_hash(model),
        architecture=type(model).__name__,
        layers={path: pack.size for path, pack in packs.items()},
        dtype=str(one.table.dtype).removeprefix("torch."),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        licence=licence,
        data=data,
        metrics=None if metrics is None else dict(metrics),
        **beside,
    )


@torch.no_grad()
def load_pack(model: nn.Module, folder: str | Path, name: str | None = None) -> str:
    """Load a pack into a model, beside other packs, frozen; the order of loading does not matter.

    Args:
        model: the one that the pack was trained on: the same weights, in the same format.
        folder: as `save_pack` wrote it.
        name: what it is called from now on; None for the name that it was saved with.

    Returns:
        The name.

    Raises:
        ValueError: the pack is damaged or belongs to another model, or the name is taken. Nothing is changed.
    """
    return read_pack(model, folder, name)()


@torch.no_grad()
def read_pack(model: nn.Module, folder: str | Path, name: str | None = None) -> Callable[[], str]:
    """The part of `load_pack` that takes long and changes nothing; what is returned does the rest, between two passes.

    So a model may compute while a pack is read. Until it is there, no other is loaded or unloaded, and weights stay.

    Raises:
        ValueError: as `load_pack`; the returned function raises it where the name is taken by then.
    """
    manifest = read_manifest(folder)
    called = manifest.name if name is None else name
    check_pack_name(called)
    _check_free(model, called)
    found = base_hash(model)
    if found != manifest.base:
        raise UserError(
            f"the pack in {folder} was made for the model {manifest.base[:12]}, a {manifest.architecture}; this one "
            f"is {found[:12]}: load that model in the same format, or train a new pack"
        )
    tensors = read_tensors(folder, manifest)
    read = _read_into_layers if manifest.settings is None else _read_beside
    put = read(model, called, folder, manifest, tensors)
    if tensors:
        raise UserError(f"the pack in {folder} has unknown tensors, such as {min(tensors)!r}; restore it")

    def load() -> str:
        _check_free(model, called)  # it may be taken since
        put()
        return called

    return load


def _read_beside(
    model: nn.Module, name: str, folder: str | Path, manifest: PackManifest, tensors: dict[str, Tensor]
) -> Callable[[], None]:
    made = plain.read(model, folder, manifest, tensors)
    return lambda: plain.put(model, name, made)


def _read_into_layers(
    model: nn.Module, name: str, folder: str | Path, manifest: PackManifest, tensors: dict[str, Tensor]
) -> Callable[[], None]:
    layers, made = _peer_layers(model), {}
    for path, count in manifest.layers.items():
        if path not in layers:
            raise UserError(f"the pack in {folder} has experts for {path!r}, which is no PEER layer of the model")
        index, experts = layers[path].product_keys, layers[path].experts
        sets, n, half = index.sub_keys.shape[1], math.isqrt(count), index.key_dim // 2
        shapes = {"sub_keys": (2, sets, n, half), "rows": (count, *experts.row_shape)}
        parts = {}
        for part, shape in shapes.items():
            tensor = tensors.pop(f"{path}.{part}".lstrip("."), None)
            if tensor is None or tensor.shape != shape or not tensor.is_floating_point() or not tensor.isfinite().all():
                raise UserError(
                    f"the pack in {folder} lacks the {part} of {path!r}, {shape} finite numbers; restore it"
                )
            parts[part] = tensor.to(index.sub_keys.device)
        made[path] = Pack(parts["sub_keys"], experts.like(parts["rows"], trained=False), trained=False)
    return lambda: _put({path: layers[path] for path in made}, name, made)


def unload_pack(model: nn.Module, name: str) -> None:
    """Take a pack out of a model; without packs its output has the bits that it had before.

    Raises:
        ValueError: no such pack is loaded, or `choose_packs` names it now.
    """
    packs = _packs(model, name)
    for place in _places(model):
        if any(name in chosen for chosen in CHOICES.get(place, ())):
            raise ValueError(f"choose_packs names the pack {name!r} now; unload it after the with block")
    if isinstance(next(iter(packs.values())), PackBeside):
        plain.take(model, name)
        return
    layers = own_peer_layers(model)
    for path in packs:
        layer = layers[path]
        layer.packs.take(name)
        if not layer.packs.by_name():
            layer.packs = None


def loaded_packs(model: nn.Module) -> list[str]:
    """The names of the packs that are loaded, sorted."""
    found = (module.by_name() for module in model.modules() if isinstance(module, LayerPacks | PacksBeside))
    return sorted({name for packs in found for name in packs})


@contextmanager
def choose_packs(model: nn.Module, names: Sequence[Sequence[str]]) -> Iterator[None]:
    """Within this context each sequence of a batch has packs of its own, in place of all that are loaded.

    The output of a sequence with none, [], has the bits that it would have if no pack were loaded. A batch may be a
    multiple as large as there are lists: each list then counts for as many sequences that follow each other, which is
    how `generate` expands a batch for beams and `num_return_sequences`. Contexts may be nested; the inner one holds.
    Under gradient checkpointing the backward pass belongs inside the context, too.

    Args:
        model: with packs loaded.
        names: for each sequence the names of its packs.

    Raises:
        ValueError: there are no lists, or one names a pack that is not loaded. A forward pass raises it where the batch
            is no multiple of the lists.
    """
    if isinstance(names, str) or not len(names) or any(isinstance(each, str) for each in names):
        raise ValueError(f"names is {names!r}; give a list of names for each sequence of the batch")
    choice = tuple(tuple(each) for each in names)
    known = loaded_packs(model)
    for name in sorted({name for each in choice for name in each}):
        if name not in known:
            raise ValueError(_not_loaded(name, known))
    names_of = list(inspect.signature(model.forward).parameters)

    def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(names_of, args, strict=False)) | kwargs
        for each in (given.get("input_ids"), given.get("inputs_embeds")):  # layers may be given tokens in one row
            if isinstance(each, Tensor):
                check_batch(each.shape[0], choice)

    handle = model.register_forward_pre_hook(check, with_kwargs=True)
    try:
        with chosen_at(_places(model), choice):
            yield
    finally:
        handle.remove()


def _places(model: nn.Module) -> list[nn.Module]:
    """What choices are looked up by: the indices of PEER layers, and what holds packs beside feed-forward layers."""
    return [*(layer.product_keys for layer in own_peer_layers(model).values()), *plain.holders(model).values()]


def _peer_layers(model: nn.Module) -> dict[str, PEER]:
    layers = own_peer_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no PEER layer, and packs are experts of such layers")
    return layers


def _layers_named(model: nn.Module, paths: Sequence[str] | None) -> dict[str, PEER]:
    layers = _peer_layers(model)
    if paths is None:
        return layers
    if isinstance(paths, str) or not paths:
        raise ValueError(f"layers is {paths!r}; give a list of paths of PEER layers, or None for all")
    for path in paths:
        if path not in layers:
            raise ValueError(f"layers has {path!r}, but the PEER layers are {listed(map(repr, layers))}")
    return {path: layer for path, layer in layers.items() if path in paths}


def _packs(model: nn.Module, name: str) -> dict[str, Pack | PackBeside]:
    """The parts of a pack by the paths of their layers."""
    held = {path: layer.packs for path, layer in own_peer_layers(model).items() if layer.packs is not None}
    held |= plain.holders(model)
    found = {path: packs.by_name()[name] for path, packs in held.items() if name in packs.by_name()}
    if not found:
        raise ValueError(_not_loaded(name, loaded_packs(model)))
    return found


def _not_loaded(name: str, known: Sequence[str]) -> str:
    return f"no pack {name!r} is loaded; there is {listed(known)}"


def _check_free(model: nn.Module, name: str) -> None:
    if name in loaded_packs(model):
        raise ValueError(f"a pack {name!r} is loaded already; unload it first, or take another name")


def _put(layers: Mapping[str, PEER], name: str, packs: Mapping[str, Pack]) -> None:
    for path, layer in layers.items():
        if layer.packs is None:
            layer.packs = LayerPacks(layer.product_keys).train(layer.training)
        layer.packs.put(name, packs[path])
