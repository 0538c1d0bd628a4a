"""Layers whose tables are sharded compute what they compute on one process: output, gradients, and bytes on the way."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peerlm.adapters.pool import AdapterPool
from peerlm.layers import PEER, ProductKeyMemory
from peerlm.parallel import mesh, parallelize, sharded_tables

from .together import together

TOKENS = 5
MESHES = [(2, 1), (3, 1), (1, 2), (2, 2)]


def peer(**settings: Any) -> nn.Module:
    return PEER(8, **{"num_experts": 49, "heads": 2, "experts_per_head": 3, "key_dim": 8} | settings)


def memory(**settings: Any) -> nn.Module:
    return ProductKeyMemory(8, **{"num_values": 49, "heads": 2, "values_per_head": 3, "key_dim": 8} | settings)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "experts": peer,
    "gated experts": lambda: peer(gated=True, activation="silu", query_norm="layer"),
    "fewer rows than ranks": lambda: peer(num_experts=1, experts_per_head=1, heads=1),
    "values": memory,
    "pool": lambda: AdapterPool(
        8, 8, num_experts=49, heads=2, experts_per_head=3, key_dim=8, rank=2, init_weights=False
    ),
}


def both_ways(rank: int, world: int, kind: str, rows: int, cols: int, uneven: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """By name what sharded tables give and what whole ones do, of this rank's tokens."""
    layers = []
    for _ in range(2):
        torch.manual_seed(0)
        layers.append(LAYERS[kind]())
    whole, cut = (
        layers[0],
        parallelize(layers[1], mesh(rows=rows, cols=cols, replica=world // (rows * cols)), dense="replicate"),
    )
    counts = [TOKENS + uneven * each for each in range(world)]
    first = sum(counts[:rank])
    mine = slice(first, first + counts[rank])
    x, factors = torch.randn(2, sum(counts), 8, generator=torch.Generator().manual_seed(1))
    x_whole, x_cut = x.clone().requires_grad_(), x[mine].clone().requires_grad_()
    y_whole, y_cut = whole(x_whole), cut(x_cut)
    (y_whole * factors).sum().backward()
    (y_cut * factors[mine]).sum().backward()
    assert x_whole.grad is not None
    assert x_cut.grad is not None
    found = {"y": (y_cut.detach(), y_whole[mine].detach()), "x": (x_cut.grad, x_whole.grad[mine])}
    expected = {name: parameter.grad for name, parameter in whole.named_parameters()}
    tables = sharded_tables(cut)
    for name, parameter in cut.named_parameters():
        assert parameter.grad is not None
        table = tables.get(name.rpartition(".")[0])
        gradient = expected[name]
        assert gradient is not None
        if table is not None:
            column, width = table.layout.columns(table.place.cols.rank)
            parts = [gradient[each.first : each.first + each.count] for each in table.pieces()]
            gradient = torch.cat([gradient[:0], *parts])[..., column : column + width]
        found[name] = (parameter.grad.to_dense() * world, gradient)
    return found


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("rows", "cols"), MESHES)
def test_a_sharded_layer_is_the_whole_one(kind: str, rows: int, cols: int) -> None:
    uneven = kind == "values" or (kind == "experts" and cols == 1 and rows == 2)
    for found in together(both_ways, rows * cols, kind, rows, cols, uneven):
        assert len(found) > 4
        for name, (actual, expected) in found.items():
            torch.testing.assert_close(
                actual, expected, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize(("kind", "rows", "cols"), [("experts", 2, 1), ("gated experts", 1, 2), ("values", 1, 1)])
def test_copies_of_a_sharded_layer_have_gradients_of_all_tokens(kind: str, rows: int, cols: int) -> None:
    for found in together(both_ways, 2 * rows * cols, kind, rows, cols, True):
        for name, (actual, expected) in found.items():
            torch.testing.assert_close(
                actual, expected, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


def narrow_rows(rank: int, world: int, row_format: str) -> list[tuple[Tensor, Tensor]]:
    """Output and rows of a layer whose rows have scales, sharded and whole."""
    layers: list[Any] = []
    for _ in range(2):
        torch.manual_seed(0)
        layers.append(PEER(32, num_experts=49, heads=2, experts_per_head=3, key_dim=8).eval())
        layers[-1].experts.convert_rows(row_format)
    parallelize(layers[1], mesh(rows=world), dense="replicate")
    x = torch.randn(TOKENS, 32)
    with torch.no_grad():
        ids = torch.tensor([48, 0, 25])
        return [
            (layers[1](x), layers[0](x)),
            (layers[1].experts.read(), layers[0].experts.read()),
            (layers[1].experts.gather(ids), layers[0].experts.gather(ids)),
        ]


@pytest.mark.parametrize("row_format", ["int8", "float8_e4m3fn", "int4"])
def test_rows_with_scales_are_looked_up_and_read_at_any_rank(row_format: str) -> None:
    for found in together(narrow_rows, 2, row_format):
        for cut, whole in found:
            torch.testing.assert_close(cut, whole)


def bytes_per_token(rank: int, world: int, num_experts: int, k: int, rows: int, cols: int) -> float:
    torch.manual_seed(0)
    layer = peer(num_experts=num_experts, experts_per_head=k, query_norm="layer")
    parallelize(layer, mesh(rows=rows, cols=cols), dense="replicate")
    (table,) = sharded_tables(layer).values()
    before = table.place.traffic.received
    for parameter in layer.product_keys.parameters():
        parameter.requires_grad_(False)  # so that none is averaged
    layer(torch.randn(TOKENS, 8).requires_grad_()).sum().backward()
    return (table.place.traffic.received - before) / TOKENS


@pytest.mark.parametrize(("rows", "cols"), MESHES)
def test_bytes_are_those_of_the_formula(rows: int, cols: int) -> None:
    ranks, dim, size = rows * cols, 8, 4
    for num_experts, k in ((49, 3), (400, 3), (49, 5)):
        entries = 2 * k
        # forward 4 bytes of each id and number, as backward; weights and products need gradients here
        if cols == 1:
            # weights have no gradient where the index is frozen, but x has one through the query
            expected = (ranks - 1) * (4 * dim * size + 12 * entries)
        else:
            across = 4 * dim * size * (cols - 1) / cols + 20 * entries * (cols - 1)
            expected = across + (rows - 1) * (4 * dim * size + 20 * entries * cols)
        assert together(bytes_per_token, ranks, num_experts, k, rows, cols) == [expected] * ranks
