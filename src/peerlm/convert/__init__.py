"""Change an existing model: PEER in place of its feed-forward layers or beside them, retrieved adapters, and growth.

Importing this package lets transformers load models that were converted.
"""

from peerlm.convert.conversion import convert, unconvert
from peerlm.convert.ffws import FFW, find_ffws
from peerlm.growth.freezing import freeze_grown
from peerlm.growth.growing import grow, set_opening, to_shells
from peerlm.growth.observation import observe
from peerlm.growth.shrinking import shrink

__all__ = [
    "FFW",
    "convert",
    "find_ffws",
    "freeze_grown",
    "grow",
    "observe",
    "set_opening",
    "shrink",
    "to_shells",
    "unconvert",
]
