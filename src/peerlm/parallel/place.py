"""Where this rank stands in a mesh, and what it sends the others, counted in bytes."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from peerlm.ops.tensors import has_values
from peerlm.parallel.meshes import NAMES, copy_group


@dataclass
class Traffic:
    """Bytes that this rank has received of others."""

    received: int = 0


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The ranks along one dimension of a mesh, of which this is one."""

    group: "dist.ProcessGroup"
    size: int
    rank: int
    traffic: Traffic
    device_type: str

    def gather(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor, (size * n, ...), in the order of ranks; all have one shape (n, ...)."""
        if self.size == 1:
            return tensor
        out = tensor.new_empty(self.size * len(tensor), *tensor.shape[1:])
        dist.all_gather_single(out, tensor.contiguous(), group=self.group)
        self.traffic.received += (self.size - 1) * tensor.nbytes
        return out

    def reduce(self, tensor: Tensor) -> Tensor:
        """This rank's part (n, ...) of the sum over ranks of tensors (size * n, ...)."""
        if self.size == 1:
            return tensor
        out = tensor.new_empty(len(tensor) // self.size, *tensor.shape[1:])
        dist.reduce_scatter_single(out, tensor.contiguous(), group=self.group)
        self.traffic.received += (self.size - 1) * out.nbytes
        return out

    def swap(self, tensor: Tensor) -> Tensor:
        """Send part r of the parts of a tensor (size * n, ...) to rank r; the parts received, in order of ranks."""
        if self.size == 1:
            return tensor
        out = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, tensor.contiguous(), group=self.group)
        self.traffic.received += (self.size - 1) * tensor.nbytes // self.size
        return out

    def most(self, number: int) -> int:
        """The largest of the ranks' numbers; each must call it, and waits."""
        if self.size == 1:
            return number
        found = torch.tensor(number, dtype=torch.int64, device=self.device_type)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.group)
        return int(found)


@dataclass(kw_only=True)
class Place:
    """This rank in a mesh."""

    mesh: DeviceMesh
    world: int
    """Ranks with a copy of the tables between them, each with tokens of its own."""
    copy: "dist.ProcessGroup"
    """These ranks."""
    replica: Axis
    """Ranks with the same part of the tables, whose gradients are averaged."""
    rows: Axis
    cols: Axis
    all: Axis
    """Every rank: the copies of what is not a table are averaged over these."""
    traffic: Traffic = field(default_factory=Traffic)
    seed: int = 0
    """Of new tables' weights: torch's of rank 0 when the place was made."""
    tables: int = 0
    """How many tables have been made here: the number of the next one, by which it is initialised."""

    @classmethod
    def of(cls, mesh: DeviceMesh) -> "Place":
        """Where this rank is in a mesh of `peerlm.parallel.mesh`; every rank must call it.

        Raises:
            ValueError: a mesh of other dimensions.
        """
        if mesh.mesh_dim_names != NAMES:
            raise ValueError(
                f"the mesh has dimensions {mesh.mesh_dim_names}, not {NAMES}: make it by peerlm.parallel.mesh"
            )
        replica, cols, rows = mesh.shape
        traffic = Traffic()
        seed = torch.tensor(torch.initial_seed() % 2**63, dtype=torch.int64, device=mesh.device_type)
        dist.broadcast(seed, src=0)

        def axis(name: str, size: int) -> Axis:
            return Axis(
                group=mesh.get_group(name),
                size=size,
                rank=mesh.get_local_rank(name),
                traffic=traffic,
                device_type=mesh.device_type,
            )

        everyone = Axis(
            group=dist.group.WORLD,  # type: ignore[arg-type]
            size=dist.get_world_size(),
            rank=dist.get_rank(),
            traffic=traffic,
            device_type=mesh.device_type,
        )
        return cls(
            mesh=mesh,
            world=cols * rows,
            copy=copy_group(mesh),
            replica=axis("replica", replica),
            rows=axis("rows", rows),
            cols=axis("cols", cols),
            all=everyone,
            traffic=traffic,
            seed=int(seed) if has_values(seed) else torch.initial_seed(),
        )
