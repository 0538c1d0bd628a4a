"""A library of whole adapters on disk, retrieved by learned keys, loaded when needed, mixed without merging."""

from peerlm.adapters.library.store import AdapterLibrary

__all__ = ["AdapterLibrary"]
