"""Change an existing model: PEER in place of its feed-forward layers or beside them, retrieved adapters, and growth."""

from peerlm.surgery.convert import convert, unconvert
from peerlm.surgery.ffw import FFW, find_ffws
from peerlm.surgery.freeze import freeze_grown
from peerlm.surgery.grow import grow, set_opening, to_shells
from peerlm.surgery.observe import observe
from peerlm.surgery.shrink import shrink

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
