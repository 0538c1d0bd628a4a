"""The files of a library of adapters: its keys and what they belong to, replaced as one."""

import hashlib
import json
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from peerlm.adapters.library.keys import Keys
from peerlm.errors import UserError
from peerlm.files import write_bytes, write_json

MANIFEST = "library.json"
_KEYS = "keys-*.safetensors"
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a library is."""

    layer: int
    """The block whose output queries and keys are taken from, counted from 1."""
    keys: Keys


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write library.json, and the keys beside it under a name of their digest; library.json is replaced last.

    Whenever the process dies, library.json names keys that are there and whole.
    """
    keys = manifest.keys
    content = save({"keys": keys.keys.contiguous(), "scatter": keys.scatter.contiguous()})
    keys_name = f"keys-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
    write_bytes(folder / keys_name, content)
    values = {
        "version": _VERSION,
        "layer": manifest.layer,
        "keys": keys_name,
        "degrees": keys.degrees,
        "temperature": keys.temperature,
        "adapters": list(keys.names),
    }
    write_json(folder / MANIFEST, values)
    for path in folder.glob(_KEYS):
        if path.name != keys_name:
            path.unlink()


def read_manifest(folder: Path) -> Manifest | None:
    """What `write_manifest` wrote; None where nothing was written yet.

    Raises:
        UserError: the files are damaged, or of another version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["version"] != _VERSION:
            raise UserError(f"{path} has version {values['version']}; this peerlm reads version {_VERSION}")
        if Path(values["keys"]).name != values["keys"]:
            raise ValueError(f"keys are {values['keys']!r}, which is no name of a file beside it")
        tensors = load((folder / values["keys"]).read_bytes())
        keys = Keys(
            names=tuple(values["adapters"]),
            keys=tensors["keys"],
            scatter=tensors["scatter"],
            degrees=values["degrees"],
            temperature=values["temperature"],
        )
        if keys.keys.shape != (len(keys.names), len(keys.scatter)) or keys.keys.dtype != torch.float32:
            raise ValueError(f"there are {len(keys.names)} adapters, but keys {tuple(keys.keys.shape)}")
        for name in keys.names:
            check_name(name)
        return Manifest(layer=values["layer"], keys=keys)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{path} is damaged ({error!r}); restore it, or remove it and add the adapters again"
        ) from error


def check_name(name: str) -> None:
    """Raise a UserError where this cannot be the name of an adapter's folder directly in the library's."""
    own = name == MANIFEST or fnmatch(name, _KEYS)
    if own or not name or name.startswith(".") or name != Path(name).name or "\\" in name:
        raise UserError(
            f"an adapter cannot be named {name!r}: take a name that can be that of a folder beside {MANIFEST}"
        )
