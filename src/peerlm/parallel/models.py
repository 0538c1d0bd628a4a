"""Models over a mesh: new ones, whose tables are nowhere whole, and those that exist."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from peerlm.layers import ProductKeys, share_statistics
from peerlm.layers.table import Table, class_of, tables_as
from peerlm.model import PeerConfig, PeerForCausalLM
from peerlm.parallel.gradients import average_gradients
from peerlm.parallel.place import Place
from peerlm.parallel.table import ShardedTable, sharded_at

DENSE = ("shard", "replicate")


def build(config: PeerConfig, mesh: DeviceMesh, *, dense: str = "shard") -> PeerForCausalLM:
    """A new language model over a mesh; no rank ever holds more of a table than its part.

    Weights depend on torch's seed, that of rank 0, and not on the mesh: rows are functions of seed, table, row and
    column, the rest is drawn on each rank alike. Every rank must call it.

    Args:
        config: of the model.
        mesh: of `peerlm.parallel.mesh`.
        dense: how what is not a table lies: "shard" over all ranks by FSDP2, or "replicate".

    Raises:
        ValueError: a mesh or a setting that cannot be.
    """
    place = _place(mesh, dense)
    torch.manual_seed(place.seed)
    with tables_as(sharded_at(place)), torch.device(mesh.device_type):
        model = PeerForCausalLM(config)
    return _spread(model, place, dense)


def parallelize(model: nn.Module, mesh: DeviceMesh, *, dense: str = "shard") -> nn.Module:
    """Spread a model that every rank has over a mesh, in place; returns it.

    Each rank keeps its part of every table and gives back the rest; what is not a table becomes that of rank 0. Make
    the optimizer afterwards. Arguments as of `build`.

    Raises:
        ValueError: a mesh or a setting that cannot be; tables that an optimizer trains already, or that are shared.
    """
    place = _place(mesh, dense)
    tables = {name: module for name, module in model.named_modules() if isinstance(module, Table)}
    for name, table in tables.items():
        if isinstance(table, ShardedTable):
            raise ValueError(f"{name} is sharded already: parallelize the model once")
        if table.watched:
            raise ValueError(f"an optimizer trains {name} already: parallelize the model, then make the optimizer")
    nn.Module.to(model, mesh.device_type)
    implementation = sharded_at(place)
    for table in tables.values():
        _cut(table, implementation)
    return _spread(model, place, dense)


def _place(mesh: DeviceMesh, dense: str) -> Place:
    if dense not in DENSE:
        raise ValueError(f"dense is {dense!r}; choose one of {', '.join(DENSE)}")
    return Place.of(mesh)


@torch.no_grad()
def _cut(table: Table, implementation: type[ShardedTable]) -> None:
    """Make a table one of which this rank holds its part."""
    if len(table.row_parameters()) > 1:
        raise ValueError(f"a {type(table).__name__} keeps its rows elsewhere and cannot be sharded")
    trained, whole, scales = table.requires_grad, table.rows.detach(), table.scales
    table.__class__ = class_of(implementation, type(table))
    assert isinstance(table, ShardedTable)
    shape = table._begin(table.num_rows, *table.row_shape)
    if scales is not None and table.place.cols.size > 1:
        raise ValueError("int8 rows have one scale for whole vectors, which cols > 1 cut: shard by rows alone")
    column, width = table.layout.columns(table.place.cols.rank)

    def own(values: Tensor) -> Tensor:
        return torch.cat([values[:0], *(values[p.first : p.first + p.count] for p in table.pieces())])

    rows = own(whole[..., column : column + width]).contiguous()
    assert rows.shape == shape
    table._keep(rows, trained=trained)
    table.scales = None if scales is None else own(scales)


def _spread(model: Any, place: Place, dense: str) -> Any:
    """Spread what is not a table over the ranks of a model whose tables are sharded."""
    kept = kept_whole(model)
    share_statistics(model, dist.group.WORLD)
    tables = {id(table.rows) for table in model.modules() if isinstance(table, ShardedTable)}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in tables]
    for tensor in (*rest, *_buffers(model)):
        dist.broadcast(tensor.detach(), src=0)
    if dense == "shard":
        ranks = init_device_mesh(place.mesh.device_type, (place.world,), mesh_dim_names=("ranks",))
        ignored = kept | {parameter for parameter in model.parameters() if id(parameter) in tables}
        whole_blocks = set(getattr(model, "_no_split_modules", None) or ())
        for module in list(model.modules()):
            if type(module).__name__ in whole_blocks:
                fully_shard(module, mesh=ranks, ignored_params=ignored)
        fully_shard(model, mesh=ranks, ignored_params=ignored)
        average_gradients(model, [each for each in rest if each in kept and each.requires_grad], place.all)
    else:
        average_gradients(model, [each for each in rest if each.requires_grad], place.all)
    return model


def kept_whole(model: nn.Module) -> set[nn.Parameter]:
    """What every rank keeps whole: sub-keys, which grow, and statistics' scales, which must choose the same experts."""
    return {
        parameter
        for index in model.modules()
        if isinstance(index, ProductKeys)
        for parameter in (index.sub_keys, *index.query_norm.parameters())
    }


def _buffers(model: nn.Module) -> list[Tensor]:
    return [
        buffer
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if not (isinstance(module, ShardedTable) and name in ("scales", "entries"))
    ]
