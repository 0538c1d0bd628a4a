"""Models over many ranks: tables sharded by rows and columns, the rest by FSDP2 or replicated."""

from peerlm.parallel.layout import RowLayout
from peerlm.parallel.meshes import mesh

__all__ = ["RowLayout", "mesh"]
