"""Packs: experts trained for one purpose, kept in a file, and loaded beside a model's own while it serves."""

from peerlm.packs.api import (
    choose_packs,
    load_pack,
    loaded_packs,
    new_pack,
    pack_parameters,
    print_trainable_parameters,
    save_pack,
    unload_pack,
)

__all__ = [
    "choose_packs",
    "load_pack",
    "loaded_packs",
    "new_pack",
    "pack_parameters",
    "print_trainable_parameters",
    "save_pack",
    "unload_pack",
]
