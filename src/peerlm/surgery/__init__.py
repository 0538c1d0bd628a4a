"""Change an existing model: PEER in place of its feed-forward layers or beside them, and retrieved adapters.

Importing this package lets transformers load models that were converted.
"""

from peerlm.surgery.convert import convert, unconvert
from peerlm.surgery.ffw import FFW, find_ffws

__all__ = ["FFW", "convert", "find_ffws", "unconvert"]
