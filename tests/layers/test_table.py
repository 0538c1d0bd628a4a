"""Tables: rows in two pieces do what whole ones do, and everything above finds out nothing."""

import copy
import io
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from peerlm import PEER, ProductKeyMemory
from peerlm.growth import grow, set_opening, shrink
from peerlm.layers import ExpertTable, Table
from peerlm.layers.table import ROW_FORMATS, tables_as
from peerlm.optim import RowAdamW, parameter_groups

DIM = 32


def layers_of(kind: str, two_pieces: type[Table], row_format: str = "float32") -> tuple[nn.Module, nn.Module]:
    """The same layer with whole tables and with tables in two pieces."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"heads": 2, "key_dim": 6, "pairing": "shells"}
        if kind == "pkm":
            return ProductKeyMemory(DIM, num_values=25, values_per_head=3, **sizes)
        return PEER(DIM, num_experts=25, experts_per_head=3, row_format=row_format, **sizes)

    with tables_as(Table):
        whole = make()
    with tables_as(two_pieces):
        return whole, make()


def table_of(layer: nn.Module) -> Table:
    return layer.experts if isinstance(layer, PEER) else layer.values


def train(layer: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> Tensor:
    for step in range(steps):
        x = torch.randn(3, DIM, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        y = layer.train()(x)
        (y - x).square().mean().backward()
        optimizer.step()
    return y


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["peer", "pkm"])
def test_rows_in_two_pieces_train_grow_and_shrink_as_whole_ones(
    kind: str, fused: bool, two_pieces: type[Table]
) -> None:
    outputs = []
    for layer in layers_of(kind, two_pieces):
        optimizer = RowAdamW(parameter_groups(layer), lr=0.01, fused=fused)
        found = [train(layer, optimizer)]
        set_opening(grow(layer, 49, optimizer=optimizer), 0.5)
        found.append(train(layer, optimizer))
        set_opening(layer, 1)
        shrink(layer, 36, usage={"product_keys": torch.arange(49)}, optimizer=optimizer)
        found.append(train(layer, optimizer))
        outputs.append([*found, table_of(layer.eval()).read()])
    for whole, pieces in zip(*outputs, strict=True):
        assert torch.equal(whole, pieces)


@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_they_are_read_written_and_saved_alike(row_format: str, two_pieces: type[Table]) -> None:
    whole, pieces = layers_of("peer", two_pieces, row_format)
    ids, rows = torch.tensor([[0, 24], [13, 12]]), torch.randn(14, 2, DIM)
    for layer in (whole, pieces):
        layer.experts.write(rows, 5)
        layer.experts.write(rows[:3, 0], 11, vector=1)
    assert torch.equal(whole.experts.gather(ids), pieces.experts.gather(ids))
    assert torch.equal(whole.experts.gather(ids, 1), pieces.experts.gather(ids, 1))
    assert torch.equal(whole.experts.read(11, 5), pieces.experts.read(11, 5))
    stored = DIM // 2 if row_format == "int4" else DIM
    assert [each.shape for each in pieces.experts.row_parameters()] == [(13, 2, stored), (12, 2, stored)]
    saved = [layer.state_dict() for layer in (whole, pieces)]
    assert list(saved[0]) == list(saved[1])
    assert all(map(torch.equal, saved[0].values(), saved[1].values()))
    for layer, state in zip((whole, pieces), reversed(saved), strict=True):
        table_of(layer).write(torch.zeros(25, 2, DIM))
        layer.load_state_dict(state)
    x = torch.randn(4, DIM)
    assert torch.equal(whole.eval()(x), pieces.eval()(x))


@pytest.mark.parametrize("kind", [Table, ExpertTable])
def test_copies_and_pickles_of_them_are_such_tables(kind: type[Table], two_pieces: type[Table]) -> None:
    with tables_as(two_pieces):
        table = kind(5, 4)
        table.write(torch.randn(5, *table.row_shape))
    file = io.BytesIO()
    torch.save(table, file)
    file.seek(0)
    for again in (copy.deepcopy(table), pickle.loads(pickle.dumps(table)), torch.load(file, weights_only=False)):
        assert type(again) is type(table)
        assert isinstance(again, two_pieces)
        assert isinstance(again, kind)
        assert torch.equal(again.read(), table.read())


def test_tables_are_whole_outside_of_the_context(two_pieces: type[Table]) -> None:
    with tables_as(Table):
        with tables_as(two_pieces):
            assert isinstance(ExpertTable(4, 3), two_pieces)
        assert type(ExpertTable(4, 3)) is ExpertTable


@pytest.fixture
def whole_tables() -> Iterator[None]:
    with tables_as(Table):
        yield


@pytest.mark.usefixtures("whole_tables")
def test_reads_are_views_where_they_can_be() -> None:
    table = Table(6, 4)
    table.write(torch.randn(6, 4))
    assert table.read(2, 3).data_ptr() == table.rows[2].data_ptr()
    table.convert_rows("int8")
    assert table.read(2, 3).dtype == torch.float32
    assert not table.has_gradients


def test_what_is_frozen_or_trained_stays_so_in_another_format() -> None:
    table = Table(6, 4).requires_grad_(False)
    table.convert_rows("bfloat16")
    assert not table.requires_grad
    table = Table(6, 4)
    table.convert_rows("int8")
    assert not table.requires_grad
    table.train_in_place()
    table.convert_rows("float8_e4m3fn")
    assert table.trained_in_place
    table.convert_rows("int4" if table.row_shape[-1] % 32 == 0 else "float32")
    assert not table.trained_in_place
    assert table.requires_grad


def test_rows_of_4_bits_are_trained_by_nobody() -> None:
    table = Table(6, 32)
    table.convert_rows("int8")
    table.train_in_place()
    table.convert_rows("int4")
    assert not table.trained_in_place
    table.train_in_place(False)
    with pytest.raises(ValueError, match="rows in int4 are not trained"):
        table.train_in_place()
