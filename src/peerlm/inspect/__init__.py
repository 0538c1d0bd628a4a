"""Look inside a model: which experts fire where, what they push, and what changes without them."""

from peerlm.inspect.collect import Collected, collect
from peerlm.inspect.edits import Edit, edit, edit_effects
from peerlm.inspect.lens import Readout, find_readout
from peerlm.inspect.run import change_of_edits, inspect
from peerlm.inspect.sites import Site, find_sites

__all__ = [
    "Collected",
    "Edit",
    "Readout",
    "Site",
    "change_of_edits",
    "collect",
    "edit",
    "edit_effects",
    "find_readout",
    "find_sites",
    "inspect",
]
