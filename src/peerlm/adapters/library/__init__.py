"""A library of whole adapters on disk, retrieved by learned keys, loaded when wanted, mixed without merging."""

from peerlm.adapters.library.store import AdapterLibrary

__all__ = ["AdapterLibrary"]
