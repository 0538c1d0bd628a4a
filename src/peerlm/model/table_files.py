"""Folders for `from_pretrained` in which tensors of tables have files of their own, beside the one with all others."""

from collections.abc import Collection
from pathlib import Path

from safetensors import safe_open

from peerlm.files import write_json

INDEX_FILE = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def file_names(names: Collection[str]) -> dict[str, str]:
    """A file for each of these tensors."""
    count = 1 + len(names)
    return {name: f"model-{number:05d}-of-{count:05d}.safetensors" for number, name in enumerate(names, start=2)}


def write_index(folder: Path, files: dict[str, str]) -> None:
    """Let a folder that `save_pretrained` wrote without these tensors say in which files all are.

    files: of `file_names`, which are there.
    """
    first = f"model-00001-of-{1 + len(files):05d}.safetensors"
    (folder / SINGLE).rename(folder / first)
    with safe_open(folder / first, framework="pt") as file:
        saved = list(file.keys())
    size = sum((folder / name).stat().st_size for name in (first, *files.values()))
    weights = dict.fromkeys(saved, first) | files
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weights})
