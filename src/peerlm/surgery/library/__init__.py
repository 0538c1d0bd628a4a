"""A library of whole adapters on disk, retrieved by learned keys, loaded when wanted, mixed without merging."""

from peerlm.surgery.library.library import AdapterLibrary

__all__ = ["AdapterLibrary"]
