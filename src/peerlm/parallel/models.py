"""Models over a mesh: new ones, whose tables are nowhere whole, and those that exist."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from peerlm.layers import ProductKeys, share_statistics
from peerlm.layers.table import Table, class_of, tables_as
from peerlm.model import PeerConfig, PeerForCausalLM
from peerlm.ops.row_formats import stored_shape
from peerlm.parallel.counting import count_by_owners
from peerlm.parallel.gradients import average_gradients
from peerlm.parallel.meshes import all_ranks
from peerlm.parallel.place import Place
from peerlm.parallel.table import ShardedTable, sharded_at, sharded_tables

DENSE = ("shard", "replicate")
_PLACE = "_peerlm_place"
ModelT = TypeVar("ModelT", bound=nn.Module)


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
    return build_from(lambda: PeerForCausalLM(config), mesh, dense=dense)


def build_from(make: Callable[[], ModelT], mesh: DeviceMesh, *, dense: str = "shard") -> ModelT:
    """As `build`: the model that `make` makes, whose tables are sharded from the start."""
    place = _place(mesh, dense)
    torch.manual_seed(place.seed)
    with tables_as(sharded_at(place)), torch.device(mesh.device_type):
        model = make()
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
    for name, table in list(tables.items()):
        if "packs" in name.split("."):
            if table.requires_grad:
                raise ValueError(f"the pack {name} is trained: packs are trained on models that are not sharded")
            del tables[name]
            continue
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
        kind = table.row_format
        raise ValueError(f"{kind} rows have scales of whole vectors, which cols > 1 cut: shard by rows alone")
    column, width = table.layout.columns(table.place.cols.rank)

    def own(values: Tensor) -> Tensor:
        return torch.cat([values[:0], *(values[p.first : p.first + p.count] for p in table.pieces())])

    rows = own(whole[..., column : column + width]).contiguous()
    assert rows.shape == stored_shape(shape, rows.dtype)
    table._keep(rows, trained=trained)
    table.scales = None if scales is None else own(scales)


def _spread(model: Any, place: Place, dense: str) -> Any:
    """Spread what is not a table over the ranks of a model whose tables are sharded."""
    kept = kept_whole(model)
    tables = {id(table.rows) for table in model.modules() if isinstance(table, ShardedTable)}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in tables]
    for tensor in (*rest, *_buffers(model)):
        dist.broadcast(tensor.detach(), src=0)
    if dense == "shard":
        ranks = all_ranks(place.mesh)
        ignored = kept | {parameter for parameter in model.parameters() if id(parameter) in tables}
        whole_blocks = set(getattr(model, "_no_split_modules", None) or ())
        for module in list(model.modules()):
            if type(module).__name__ in whole_blocks:
                fully_shard(module, mesh=ranks, ignored_params=ignored)
        fully_shard(model, mesh=ranks, ignored_params=ignored)
    setattr(model, _PLACE, place)
    count_by_owners(model)
    model._ddp_params_and_buffers_to_ignore = _NotOfDDP()
    exchange_gradients(model)
    return model


class _NotOfDDP:
    """What DistributedDataParallel asks a model for first: it would make every rank's rows those of rank 0."""

    def __iter__(self) -> Iterator[str]:
        raise ValueError(
            "the model's tables are sharded, which DistributedDataParallel, as of transformers.Trainer or Accelerate, "
            "cannot train: run `peerlm train` or a loop of your own, or leave the tables whole"
        )


def exchange_gradients(model: nn.Module) -> None:
    """Share what ranks of a model of `build` or `parallelize` do: again where parameters are others, as after growth.

    Raises ValueError for another model.
    """
    place: Place | None = getattr(model, _PLACE, None)
    if place is None:
        raise ValueError("the model is not one of peerlm.parallel.build or parallelize")
    share_statistics(model, place.all.group)
    tables = {id(table.rows) for table in model.modules() if isinstance(table, ShardedTable)}
    whole = [each for each in model.parameters() if id(each) not in tables and not isinstance(each, DTensor)]
    cut = [table.rows for table in sharded_tables(model).values() if table.rows.requires_grad]
    average_gradients(model, [each for each in whole if each.requires_grad], place.all, cut, place.replica)


def place_of(model: nn.Module) -> Place:
    """Where this rank is in the mesh of a model of `build` or `parallelize`."""
    place: Place = getattr(model, _PLACE)
    return place


def checkpoint_attention(model: nn.Module) -> None:
    """Compute attention again in backward passes, in place of keeping its activations; tables are not asked again."""
    for attention in _attention(model):
        attention.forward = partial(checkpoint, attention.forward, use_reentrant=False)


def compile_dense(model: nn.Module) -> None:
    """Let torch.compile compile attention: what is around tables communicates."""
    for attention in _attention(model):
        attention.compile()


def _attention(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.rpartition(".")[2] in ("self_attn", "attention")]


def kept_whole(model: nn.Module) -> set[nn.Parameter]:
    """What every rank keeps whole: sub-keys and statistics, by which all must choose the same experts, and packs."""
    of_indices = {
        parameter
        for index in model.modules()
        if isinstance(index, ProductKeys)
        for parameter in (index.sub_keys, *index.query_norm.parameters())
    }
    return of_indices | {each for name, each in model.named_parameters() if "packs" in name.split(".")}


def _buffers(model: nn.Module) -> list[Tensor]:
    return [
        buffer
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if not (isinstance(module, ShardedTable) and name in ("scales", "entries"))
    ]
