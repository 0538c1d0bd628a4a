"""A library's folder: opened with the model that it belongs to, and adapters copied into it."""

import shutil
from pathlib import Path

from peerlm.adapters.library.base import BaseModel
from peerlm.adapters.library.keys import Keys
from peerlm.adapters.library.lora_files import CONFIG_NAME, WEIGHTS_NAME
from peerlm.adapters.library.manifest import MANIFEST, Manifest, read_manifest
from peerlm.errors import UserError


def open_folder(folder: Path, base: BaseModel, layer: int | None) -> Manifest:
    """The manifest of a library for this model, an empty one where there is none yet.

    Args:
        folder: of the library.
        base: the model that it belongs to.
        layer: the block whose output queries are; None takes that of the folder, or the middle one.

    Raises:
        UserError: the folder is damaged, or belongs to another model or layer.
        ValueError: the model has no such block.
    """
    blocks, dim = len(base.blocks), base.dim
    if layer is not None and not 1 <= layer <= blocks:
        raise ValueError(f"layer is {layer}; the model has blocks 1 to {blocks}")
    manifest, path = read_manifest(folder), folder / MANIFEST
    if manifest is None:
        return Manifest(layer=layer or (blocks + 1) // 2, keys=Keys.empty(dim))
    if layer not in (None, manifest.layer):
        raise UserError(f"layer is {layer}, but {path} has keys of layer {manifest.layer}; leave layer out")
    if manifest.layer > blocks or len(manifest.keys.scatter) != dim:
        raise UserError(
            f"{path} has keys of {len(manifest.keys.scatter)} features after block {manifest.layer}, but the model "
            f"has {dim} features and {blocks} blocks; open it with the model that it was made with"
        )
    for name in manifest.keys.names:
        if not (folder / name).is_dir():
            raise UserError(f"{path} names {name!r}, but {folder / name} is not there; restore it")
    return manifest


def copy_adapter(source: Path, folder: Path, name: str) -> None:
    """Copy the adapter in `source` to `folder / name`, whole or not at all."""
    target = folder / name
    if target.exists():
        raise UserError(f"{target} is there already; add that folder, or give another name")
    partial = folder / f".partial-{name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in (CONFIG_NAME, WEIGHTS_NAME):
        shutil.copyfile(source / file, partial / file)
    partial.replace(target)
