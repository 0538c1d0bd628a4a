"""The mesh of ranks: copies of the tables, cuts of their columns, cuts of their rows."""

import os

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

_RANKS = "_peerlm_ranks"
_COPIES = "_peerlm_copies"
NAMES = ("replica", "cols", "rows")
"""Dimensions of the mesh, the innermost last: ranks along "rows" are neighbours, within one node."""


def mesh(
    *, rows: int | None = None, cols: int | None = None, replica: int = 1, device_type: str | None = None
) -> DeviceMesh:
    """The mesh ("replica", "cols", "rows") over all ranks of torch.distributed, which must be initialised.

    Args:
        rows: ranks that the rows of a table are cut over. None: those of one node, or what cols and replica leave.
        cols: ranks that columns are cut over. None: what is left.
        replica: how often a table is there.
        device_type: "cpu" or "cuda". None: that of the process group's backend.

    Raises:
        ValueError: sizes whose product is not the number of ranks.
    """
    world = dist.get_world_size()
    if rows is None:
        left = world // (max(replica, 1) * max(cols or 1, 1))
        rows = left if cols is not None else min(left, int(os.environ.get("LOCAL_WORLD_SIZE", left)))
    if cols is None:
        cols = world // max(1, rows * replica)
    if min(rows, cols, replica) < 1 or rows * cols * replica != world:
        raise ValueError(
            f"replica x cols x rows = {replica} x {cols} x {rows}, but {world} ranks have been started: "
            f"their product must be {world}"
        )
    if device_type is None:
        device_type = "cuda" if dist.get_backend() == "nccl" else "cpu"
    made = init_device_mesh(device_type, (replica, cols, rows), mesh_dim_names=NAMES)
    setattr(made, _RANKS, init_device_mesh(device_type, (world,), mesh_dim_names=("ranks",)))
    setattr(made, _COPIES, _copies(made))
    return made


def all_ranks(mesh: DeviceMesh) -> DeviceMesh:
    """All ranks of a mesh as one dimension, "ranks", over which FSDP2 cuts what is not a table."""
    found: DeviceMesh | None = getattr(mesh, _RANKS, None)
    return found or init_device_mesh(mesh.device_type, (mesh.size(),), mesh_dim_names=("ranks",))


def copy_group(mesh: DeviceMesh) -> "dist.ProcessGroup":
    """The ranks that hold one copy of the tables, of which this is one."""
    copies: DeviceMesh = getattr(mesh, _COPIES, None) or _copies(mesh)
    return copies.get_group("copy")


def _copies(mesh: DeviceMesh) -> DeviceMesh:
    replica, cols, rows = mesh.shape
    return init_device_mesh(mesh.device_type, (replica, cols * rows), mesh_dim_names=("copies", "copy"))
