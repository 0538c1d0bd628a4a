"""Packs of a model without experts: which feed-forward layers they go beside, how they are made, read and put there."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peerlm.convert.ffws import FFW, find_ffws
from peerlm.convert.insertion import FFWSite, add_beside, find_module, take_from_beside
from peerlm.errors import UserError, listed
from peerlm.packs.beside import CHILD, DEFAULTS, PackBeside, PacksBeside
from peerlm.packs.choice import chosen_at
from peerlm.packs.files import PackManifest

Made = dict[str, tuple[PackBeside, str | None]]
"""Parts of a pack by the paths of their layers, with `FFWSite.first` of these."""


def holders(model: nn.Module) -> dict[str, PacksBeside]:
    """What holds the packs beside feed-forward layers, by the paths of these."""
    ending = f".{CHILD}"
    return {
        path.removesuffix(ending): module for path, module in model.named_modules() if isinstance(module, PacksBeside)
    }


def make(
    model: nn.Module,
    num_experts: int,
    layers: Sequence[str] | None,
    settings: Mapping[str, Any],
    row_format: str,
    generator: torch.Generator,
) -> Made:
    """Parts of a new pack: vectors v are zero, gates are open, the rest is as at the start of a PEER layer.

    Raises:
        ValueError: the model has no feed-forward layers, or none of these names; a setting is impossible.
    """
    made: Made = {}
    for key in ("num_experts", "row_format"):
        if key in settings:
            raise ValueError(f"settings has {key}, which new_pack takes by itself: {key}={settings[key]!r}")
    chosen = {**DEFAULTS, "experts_per_head": min(DEFAULTS["experts_per_head"], math.isqrt(num_experts)), **settings}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
        for ffw in _chosen(_ffws(model), layers):
            try:
                pack = PackBeside(ffw.dim, {**chosen, "num_experts": num_experts, "row_format": row_format})
            except TypeError as error:
                raise ValueError(f"a setting of the pack is none of PEER's: {error}") from error
            pack.peer.experts.fill_new(0, generator)
            pack.ffw_power = max(ffw.sample_output.float().square().mean().item(), 1e-12)
            made[ffw.path] = pack.to(ffw.sample_input.device), FFWSite.of(ffw).first
    return made


def check_plain(model: nn.Module) -> None:
    """Raise a ValueError where a model has no feed-forward layers that a pack can lie beside."""
    _ffws(model)


def experts_within(model: nn.Module, layers: Sequence[str] | None, megabytes: float) -> int:
    """The most experts of each layer, a square number, with which a pack of float32 numbers has so many megabytes.

    Raises:
        ValueError: as `make`; or not even 4 experts fit.
    """
    ffws = _chosen(_ffws(model), layers)
    n = 1
    while _numbers(ffws, n + 1) * 4 <= megabytes * 1e6:
        n += 1
    if n < 2:
        raise ValueError(
            f"{megabytes:g} MB have no room for 4 experts in each of {len(ffws)} layers: allow more, or fewer layers"
        )
    return n * n


def _numbers(ffws: Sequence[FFW], n: int) -> int:
    """Of a pack with n * n experts in each layer and the default settings."""
    query = DEFAULTS["heads"] * DEFAULTS["key_dim"]
    keys = DEFAULTS["key_dim"] * n + 2 * DEFAULTS["key_dim"]
    return sum(2 * n * n * ffw.dim + query * ffw.dim + keys + ffw.dim + 1 for ffw in ffws)


def _ffws(model: nn.Module) -> list[FFW]:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} has no PEER layer and is no model of transformers; packs go beside the "
            "feed-forward layers of one, or into PEER layers"
        )
    with chosen_at(holders(model).values(), ((),)):  # what is loaded would hide where a layer ends
        return find_ffws(model)


def _chosen(ffws: Sequence[FFW], paths: Sequence[str] | None) -> list[FFW]:
    if paths is None:
        return list(ffws)
    if isinstance(paths, str) or not paths:
        raise ValueError(f"layers is {paths!r}; give a list of paths of feed-forward layers, or None for all")
    known = {ffw.path: ffw for ffw in ffws}
    for path in paths:
        if path not in known:
            raise ValueError(f"layers has {path!r}, but the feed-forward layers are {listed(map(repr, known))}")
    return [ffw for ffw in ffws if ffw.path in paths]


def read(model: nn.Module, folder: str | Path, manifest: PackManifest, tensors: dict[str, Tensor]) -> Made:
    """Parts of a pack from its file, frozen.

    Raises:
        UserError: the pack does not fit the model, or is damaged.
    """
    made: Made = {}
    settings, first = manifest.settings or {}, manifest.first or {}
    for path, count in manifest.layers.items():
        parts = {
            name.removeprefix(f"{path}."): tensors.pop(name) for name in list(tensors) if name.startswith(f"{path}.")
        }
        rows, gate = parts.get("peer.experts.rows"), parts.get("gate.weight")
        try:
            if rows is None or gate is None or len(rows) != count or gate.ndim != 1:
                raise ValueError("it lacks rows, or its gate")
            if not all(part.isfinite().all() for part in parts.values()):
                raise ValueError("not all of its numbers are finite")
            pack = PackBeside(len(gate), {**settings, "num_experts": count})
            pack.load_state_dict(parts)
            device = next(find_module(model, path).parameters()).device
        except (ValueError, TypeError, RuntimeError, StopIteration) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"the pack in {folder} cannot be put beside {path!r} ({reason}); restore it") from error
        made[path] = pack.requires_grad_(False).to(device), first.get(path)
    return made


def put(model: nn.Module, name: str, made: Made) -> None:
    """Add the parts of a pack."""
    found = holders(model)
    for path, (pack, first) in made.items():
        if path not in found:
            holder = PacksBeside(pack.gate.weight.shape[0], first).train(model.training)
            add_beside(model, path, first, holder, child=CHILD, masks=None)
            found[path] = holder
        found[path].put(name, pack)


def take(model: nn.Module, name: str) -> None:
    """Remove the parts of a pack, and the hooks where no pack remains."""
    for path, holder in holders(model).items():
        if name in holder.by_name():
            holder.take(name)
            if not holder.by_name():
                take_from_beside(model, path, holder.first, child=CHILD)
