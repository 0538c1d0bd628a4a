"""Models over many ranks: tables sharded by rows and columns, the rest by FSDP2 or replicated."""

from peerlm.parallel.export import from_pretrained, save_pretrained
from peerlm.parallel.gradients import set_requires_gradient_sync, unsynchronised
from peerlm.parallel.layout import RowLayout
from peerlm.parallel.measures import since_last
from peerlm.parallel.meshes import mesh
from peerlm.parallel.models import (
    build,
    build_from,
    checkpoint_attention,
    compile_dense,
    exchange_gradients,
    parallelize,
    place_of,
)
from peerlm.parallel.table import ShardedTable, local_states, sharded_tables

__all__ = [
    "RowLayout",
    "ShardedTable",
    "build",
    "build_from",
    "checkpoint_attention",
    "compile_dense",
    "exchange_gradients",
    "from_pretrained",
    "local_states",
    "mesh",
    "parallelize",
    "place_of",
    "save_pretrained",
    "set_requires_gradient_sync",
    "sharded_tables",
    "since_last",
    "unsynchronised",
]
