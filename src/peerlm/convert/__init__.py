"""Change an existing model's layers: PEER in place of its feed-forward layers, or beside them.

Importing this package lets transformers load models that were converted.
"""

from peerlm.convert.conversion import convert, unconvert
from peerlm.convert.ffws import FFW, find_ffws

__all__ = ["FFW", "convert", "find_ffws", "unconvert"]
