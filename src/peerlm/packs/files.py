"""The files of a pack: its tensors as safetensors, and a manifest that says what they are, replaced last."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from peerlm.errors import UserError
from peerlm.files import PARTIAL, remove_partials, write_bytes, write_json

MANIFEST = "manifest.json"
_WEIGHTS = "pack-*.safetensors"
_FORMAT = "peerlm pack"
_VERSIONS = (1, 2)
_BESIDE = ("settings", "first")
"""Fields that version 1 does not have."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class PackManifest:
    """What a pack is."""

    name: str
    """What it is called, unless `load_pack` is told otherwise."""
    base: str
    """`base_hash` of the model that it was trained on."""
    architecture: str
    """The class of that model, for people."""
    layers: dict[str, int]
    """The layers that it adds experts to, by their paths, and how many: PEER layers, or feed-forward layers of a model
    without experts."""
    dtype: str
    """Of the rows."""
    parameters: int
    """Numbers in it."""
    licence: str | None
    """Under which it may be used; None where it is not stated."""
    data: Any
    """What it was trained on, as it was given: any JSON."""
    metrics: dict[str, Any] | None
    """What was measured, as it was given."""
    weights: str
    """The file of its tensors, beside the manifest."""
    sha256: str
    """Of that file."""
    settings: dict[str, Any] | None = None
    """Of a pack for a model without experts: those of its PEER layers; None where the layers are the model's."""
    first: dict[str, str] | None = None
    """Of feed-forward layers that are spread over their blocks: the path of the map that reads, by their path."""


def check_pack_name(name: str) -> None:
    """Raise a ValueError where a pack cannot be called this."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"a pack cannot be called {name!r}; take up to 64 letters, digits, _ and -, not _ or - first")


def write_pack(folder: Path, tensors: Mapping[str, Tensor], **facts: Any) -> PackManifest:
    """Write a pack; whenever the process dies, the folder has the old one whole, or the new one.

    Args:
        folder: made if it is not there. One that has other files than those of a pack is refused.
        tensors: contiguous, by name.
        facts: the fields of `PackManifest` besides those of the file.

    Raises:
        ValueError: licence, data or metrics are nothing that JSON has; the folder holds something else.
    """
    try:
        json.dumps([facts["licence"], facts["data"], facts["metrics"]], allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"licence, data and metrics are written as JSON, which cannot be done ({error})") from error
    if folder.exists() and (not folder.is_dir() or not all(_is_ours(path) for path in folder.iterdir())):
        raise UserError(f"{folder} is there, and is no pack; name a new folder")
    content = save(dict(tensors))
    digest = hashlib.sha256(content).hexdigest()
    manifest = PackManifest(weights=_WEIGHTS.replace("*", digest[:16]), sha256=digest, **facts)
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / manifest.weights, content)
    values = asdict(manifest)
    beside = {field: values.pop(field) for field in _BESIDE}
    new = beside["settings"] is not None  # an older peerlm reads what has nothing new
    write_json(folder / MANIFEST, {"format": _FORMAT, "version": 2 if new else 1, **values, **(beside if new else {})})
    remove_partials(folder)
    for path in folder.glob(_WEIGHTS):
        if path.name != manifest.weights:
            path.unlink()
    return manifest


def _is_ours(path: Path) -> bool:
    if path.name == MANIFEST:
        values = _values(path)
        return values is None or values.get("format") == _FORMAT
    return path.name.startswith(PARTIAL) or fnmatch(path.name, _WEIGHTS)


def _values(path: Path) -> dict[str, Any] | None:
    """The object in a file of JSON, None where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def read_manifest(folder: str | Path) -> PackManifest:
    """The manifest of the pack in a folder.

    Raises:
        UserError: there is none, it is damaged, or of a version that this peerlm does not read.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} is no pack: it has no {MANIFEST}; name a folder that save_pack wrote")
    values = _values(path)
    if values is None:
        raise _damaged(path, "it is no JSON object")
    if values.pop("format", None) != _FORMAT:
        raise UserError(f"{path} is not that of a pack; name a folder that save_pack wrote")
    version = values.pop("version", None)
    if version not in _VERSIONS:
        raise UserError(
            f"{path} has version {version!r}, and this peerlm reads {_VERSIONS[-1]}; install a newer peerlm"
        )
    try:
        manifest = PackManifest(**values)
        check_pack_name(manifest.name)
    except (TypeError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    for name, right in (
        ("base", isinstance(manifest.base, str)),
        ("layers", isinstance(manifest.layers, dict) and bool(manifest.layers)),
        ("settings", manifest.settings is None or isinstance(manifest.settings, dict)),
        ("first", manifest.first is None or isinstance(manifest.first, dict)),
        (
            "weights",
            isinstance(manifest.weights, str) and re.fullmatch(r"pack-[0-9a-f]{16}\.safetensors", manifest.weights),
        ),
    ):
        if not right:
            raise _damaged(path, f"{name} is {getattr(manifest, name)!r}")
    for count in manifest.layers.values():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1 or math.isqrt(count) ** 2 != count:
            raise _damaged(path, f"layers have {count!r} experts")
    return manifest


def read_tensors(folder: str | Path, manifest: PackManifest) -> dict[str, Tensor]:
    """The tensors of a pack; nothing is unpickled.

    Raises:
        UserError: the file is missing, or is not the one that the manifest was written for.
    """
    path = Path(folder) / manifest.weights
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); restore the pack") from error
    if hashlib.sha256(content).hexdigest() != manifest.sha256:
        raise _damaged(path, "its hash is not the one in the manifest")
    try:
        return load(content)
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path} is damaged ({why}); restore the pack, or save it again")
