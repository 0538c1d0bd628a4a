"""Look inside a model: which experts fire where, what they push, and what changes without them."""

from peerlm.interpret.collection import Collected, collect
from peerlm.interpret.edits import Edit, edit, edit_effects
from peerlm.interpret.inspected import InspectedLayer, find_inspected_layers
from peerlm.interpret.lens import Readout, find_readout
from peerlm.interpret.run import change_of_edits, inspect

__all__ = [
    "Collected",
    "Edit",
    "InspectedLayer",
    "Readout",
    "change_of_edits",
    "collect",
    "edit",
    "edit_effects",
    "find_inspected_layers",
    "find_readout",
    "inspect",
]
