"""Models over many ranks: tables sharded by rows and columns, the rest by FSDP2 or replicated."""

from peerlm.parallel.gradients import set_requires_gradient_sync, unsynchronised
from peerlm.parallel.layout import RowLayout
from peerlm.parallel.meshes import mesh
from peerlm.parallel.models import build, parallelize
from peerlm.parallel.table import ShardedTable, local_states, sharded_tables

__all__ = [
    "RowLayout",
    "ShardedTable",
    "build",
    "local_states",
    "mesh",
    "parallelize",
    "set_requires_gradient_sync",
    "sharded_tables",
    "unsynchronised",
]
