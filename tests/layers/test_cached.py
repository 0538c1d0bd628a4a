"""Tables with places on a device have the bits of tables in memory, whatever comes and goes, and refuse what they must.

The device is the CPU, on which all is done as on a GPU.
"""

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peerlm import PEER, UserError
from peerlm.growth.freezing import freeze_grown
from peerlm.layers import ProductKeyMemory, Table
from peerlm.layers.mapped import cache as mapped_cache
from peerlm.layers.mapped.cached import CachedTable, cache_tables
from peerlm.layers.mapped.place import RowPlace
from peerlm.layers.mapped.table import mapped_in
from peerlm.layers.table import tables_as
from peerlm.ops.row_keeping import rows_stay_in_files
from peerlm.ops.row_updates import rows_as_they_are
from peerlm.optim import RowAdamW, clip_gradients
from peerlm.optim.restrict import restrict_gradient

from ..host_reads import HostReads
from .test_mapped import MODES, assert_same, mapped, peer, reopened, step, trainer

pytestmark = pytest.mark.whole_tables("makes tables in files and tables in memory itself")
CPU = torch.device("cpu")
A_BATCH = 48
"""Entries that a step of `test_mapped.step` looks up: no batch has more distinct rows."""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[RowPlace]:
    place = RowPlace(tmp_path / "rows", owner="run")
    yield place
    place.close()


def cached(place: RowPlace, places: int = A_BATCH, **options: Any) -> PEER:
    layer = mapped(place, **options)
    assert cache_tables(layer, CPU, places) == ["experts"]
    return layer


def everything(layer: PEER, optimizer: RowAdamW) -> dict[str, Tensor]:
    """All that is kept of rows, by their numbers, as it is."""
    with rows_as_they_are(), torch._C.DisableTorchFunctionSubclass():
        saved = {f"row {name}": value.clone() for name, value in layer.experts.state_dict().items()}
        parameters = [id(p) for group in optimizer.param_groups for p in group["params"]]
        number = parameters.index(id(layer.experts.rows))
        state = optimizer.state_dict()["state"].get(number, {})
    return saved | {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("mode", MODES)
def test_training_ends_with_the_bits_of_tables_in_memory_and_goes_back_to_a_checkpoint(
    mode: str, place: RowPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped_cache, "_BYTES_AT_ONCE", 3000)  # rows come and go a few at a time
    options, settings = MODES[mode]
    plain, layer = peer(**options), cached(place, **options)
    optimizer, reference = trainer(layer, **settings), trainer(plain, **settings)
    for number in range(4):
        step(layer, optimizer, number), step(plain, reference, number)
    record = place.prepare()
    place.begin(record)
    saved = everything(plain, reference)
    assert_same(everything(layer, optimizer), saved)
    with rows_as_they_are(), rows_stay_in_files():
        rest = copy.deepcopy((dict(layer.state_dict()), optimizer.state_dict()))
    for number in range(4, 9):
        step(layer, optimizer, number), step(plain, reference, number)
    wanted = everything(plain, reference)
    assert_same(everything(layer, optimizer), wanted)
    assert layer.experts._cache.fetched > 2 * A_BATCH
    assert layer.experts._cache.written > A_BATCH

    again = reopened(place)
    layer = cached(again, 50, **options)
    optimizer = trainer(layer, **settings)
    again.restore(record)
    kept = {"exp_avg", "exp_avg_sq", "moments_step", "weights_step"}
    states = {
        index: {k: v for k, v in state.items() if k not in kept or "number" not in state}
        for index, state in rest[1]["state"].items()
    }
    with rows_stay_in_files():
        layer.load_state_dict(rest[0], strict=False)
        optimizer.load_state_dict({**rest[1], "state": states})
    assert_same(everything(layer, optimizer), saved)
    for number in range(4, 9):
        step(layer, optimizer, number)
    assert_same(everything(layer, optimizer), wanted)
    for module, trained in ((layer, optimizer), (plain, reference)):
        trained.catch_up()
        module.eval()
    x = torch.randn(5, 16)
    assert torch.equal(layer(x), plain(x))
    again.close()


def table(place: RowPlace | None, places: int, num_rows: int = 40, **options: Any) -> Table:
    """A table of 40 rows with the same numbers each time; in files with so many places, or in memory."""
    if place is None:
        found = Table(num_rows, 6, **options)
    else:
        with tables_as(mapped_in(place)):
            found = Table(num_rows, 6, **options)
        assert cache_tables(found, CPU, places) == [""]
    found.write(torch.randn(num_rows, 6, generator=torch.Generator().manual_seed(1)))
    return found


def looked_up(found: Table, ids: list[int]) -> Tensor:
    return found.mix(torch.linspace(1, 2, len(ids))[None], torch.tensor([ids]))


def cache_of(found: Table) -> mapped_cache.RowCache:
    assert isinstance(found, CachedTable)
    assert found._cache is not None
    return found._cache


@pytest.mark.parametrize(("places", "most"), [(1, 1), (2, 2), (7, 7), (39, 39), (40, 40), (99, 40)])
def test_whatever_comes_and_goes_rows_have_the_bits_of_a_table_in_memory(
    places: int, most: int, place: RowPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped_cache, "_BYTES_AT_ONCE", 200)
    plain, found = table(None, 0), table(place, places)
    assert len(found.rows) == most
    optimizers = [RowAdamW(each.parameters(), lr=0.1, weight_decay=0.1) for each in (plain, found)]
    draw = torch.Generator().manual_seed(places)
    for number in range(25):
        some = torch.randperm(40, generator=draw)[: int(torch.randint(most + 1, (), generator=draw))]
        ids = some[torch.randint(len(some), (3, 5), generator=draw)] if len(some) else some.view(0, 5)
        if number % 3 == 2:
            with torch.no_grad():
                assert torch.equal(found.gather(ids), plain.gather(ids))
            continue
        weights = torch.randn(ids.shape, generator=draw)
        for each, optimizer in zip((plain, found), optimizers, strict=True):
            optimizer.zero_grad()
            each.mix(weights, ids).square().sum().backward()
            optimizer.step()
    with torch.no_grad():
        assert torch.equal(found.read(3, 30), plain.read(3, 30))
        assert torch.equal(found.read(), plain.read())
    saved, expected = (optimizer.state_dict()["state"][0] for optimizer in (optimizers[1], optimizers[0]))
    assert_same(*({k: v for k, v in each.items() if isinstance(v, Tensor)} for each in (saved, expected)))


def test_more_rows_than_places_are_refused_by_their_number_and_nothing_is_lost(place: RowPlace) -> None:
    plain, found = table(None, 0), table(place, 5)
    optimizers = [RowAdamW(each.parameters(), lr=0.1) for each in (plain, found)]

    def micro_batch(ids: list[int]) -> None:
        for each in (plain, found):
            looked_up(each, ids).square().sum().backward()

    micro_batch([1, 2, 3])
    micro_batch([3, 9, 9])  # rows of both stay until the step
    with pytest.raises(UserError, match=r"6 rows of a table are needed at once on cpu, and its cache there holds 5"):
        looked_up(found, [20, 21, 1])
    with torch.no_grad():
        assert torch.equal(found.gather(torch.tensor([30])), plain.gather(torch.tensor([30])))
    with (
        pytest.raises(UserError, match=r"take 7 or more \(tables\.device_rows of a recipe, --device-rows of a"),
        torch.no_grad(),
    ):
        found.gather(torch.arange(10, 13))
    for optimizer in optimizers:
        optimizer.step()
    with torch.no_grad():
        assert torch.equal(found.gather(torch.arange(10, 15)), plain.gather(torch.arange(10, 15)))
        assert torch.equal(found.read(), plain.read())


def test_rows_of_a_forward_pass_stay_until_its_backward_pass_and_no_longer(place: RowPlace) -> None:
    plain, found = table(None, 0), table(place, 4)
    for each in (plain, found):
        RowAdamW(each.parameters())
    weights = torch.randn(1, 2)

    def forward(each: Table, ids: list[int]) -> tuple[Tensor, Tensor]:
        leaf = weights.clone().requires_grad_()
        return each.mix(leaf, torch.tensor([ids])).square().sum(), leaf

    (loss, leaf), (expected, other) = forward(found, [1, 2]), forward(plain, [1, 2])
    with torch.no_grad():
        found.gather(torch.tensor([5, 6])), found.gather(torch.tensor([7, 8]))
        with pytest.raises(UserError, match="5 rows"):
            found.gather(torch.tensor([1, 5, 6, 7]))
    loss.backward(retain_graph=True), expected.backward(retain_graph=True)
    assert torch.equal(leaf.grad, other.grad)
    loss.backward(retain_graph=True)
    found.zero_grad()
    with torch.no_grad():
        found.gather(torch.arange(10, 14))  # while the graph is there
    with pytest.raises(RuntimeError, match="have left the device since its first backward pass"):
        loss.backward()
    forward(found, [1, 2])  # of a graph that nothing has any more
    with torch.no_grad():
        found.gather(torch.arange(20, 24))


def test_gradients_of_the_same_norm_are_clipped_whatever_places_rows_have(place: RowPlace) -> None:
    norms = []
    for places, first in ((40, 0), (40, 7), (12, 3)):
        found = table(place, places)
        optimizer = RowAdamW(found.parameters(), lr=0.1)
        for ids in (torch.randperm(12, generator=torch.Generator().manual_seed(first)), torch.arange(12)):
            for row in ids.split(4):
                with torch.no_grad():
                    found.gather(row)
        found.mix(torch.linspace(0, 3, 24).view(2, 12), torch.arange(12).repeat(2, 1)).square().sum().backward()
        norms.append(clip_gradients(optimizer.param_groups, max_norm=1.0, table_max_norm=1.0).of_tables)
    assert cache_of(found).names[:12].tolist() != list(range(12))
    assert torch.equal(norms[0], norms[1])
    assert torch.equal(norms[0], norms[2])


def test_other_betas_and_a_sweep_reach_rows_that_are_not_on_the_device(place: RowPlace) -> None:
    plain, layer = peer(), cached(place)
    optimizer, reference = trainer(layer), trainer(plain)
    for number in range(8):
        if number == 4:
            for each in (optimizer, reference):
                each.param_groups[0]["betas"] = each.param_groups[1]["betas"] = (0.8, 0.99)
        if number == 6:
            for each in (optimizer, reference):
                each.catch_up()
        step(layer, optimizer, number), step(plain, reference, number)
    assert_same(everything(layer, optimizer), everything(plain, reference))


def test_a_state_dict_is_that_of_a_table_in_memory_and_loads_in_both_kinds(place: RowPlace) -> None:
    plain, layer = peer(), cached(place)
    optimizer, reference = trainer(layer), trainer(plain)
    for number in range(3):
        step(layer, optimizer, number)
    saved = copy.deepcopy((dict(layer.state_dict()), optimizer.state_dict()))
    plain.load_state_dict(saved[0]), reference.load_state_dict(copy.deepcopy(saved[1]))
    other = cached(place)
    again = trainer(other)
    step(other, again, 77)
    other.load_state_dict(saved[0]), again.load_state_dict(saved[1])
    for number in range(3, 6):
        for each, own in ((layer, optimizer), (plain, reference), (other, again)):
            step(each, own, number)
    assert_same(everything(layer, optimizer), everything(plain, reference))
    assert_same(everything(other, again), everything(plain, reference))


def test_rows_are_written_drawn_and_restricted_by_their_numbers(place: RowPlace) -> None:
    plain, found = table(None, 0), table(place, 8)
    optimizers = [RowAdamW(each.parameters(), lr=0.1) for each in (plain, found)]
    keep = torch.arange(40) % 2 == 0
    for each, optimizer in zip((plain, found), optimizers, strict=True):
        looked_up(each, [3, 30, 4]).square().sum().backward()
        each.write(torch.ones(2, 6), 30)  # the gradient keeps its rows
        for parameter, rows in each.parts():
            restrict_gradient(parameter, keep[rows])
        optimizer.step()
    with torch.no_grad():
        assert torch.equal(found.read(), plain.read())
        for each in (plain, found):
            torch.manual_seed(5)
            each.fill_normal(0.5)
        assert torch.equal(found.gather(torch.tensor([3, 30, 9])), plain.gather(torch.tensor([3, 30, 9])))
    step_of_all = cache_of(found).home.kept_state("weights_step")
    assert step_of_all is not None
    assert len(step_of_all) == 40


@pytest.mark.parametrize("row_format", ["float32", "bfloat16", "int8", "int4"])
def test_a_loaded_table_is_read_by_places_and_stays_as_it_is(row_format: str) -> None:
    torch.manual_seed(0)
    plain = PEER(32, num_experts=64, heads=2, experts_per_head=4, key_dim=8, row_format=row_format)
    layer = copy.deepcopy(plain).eval()
    plain.eval()
    assert cache_tables(layer, CPU, 48) == ["experts"]
    layer.to("cpu")
    for number in range(4):
        x = torch.randn(5, plain.experts.dim, generator=torch.Generator().manual_seed(number))
        assert torch.equal(layer(x), plain(x))
    rows = cache_of(layer.experts)
    assert (rows.fetched > 48, rows.written) == (True, 0)
    assert 0 < rows.found < rows.asked
    assert torch.equal(layer.experts.read(), plain.experts.read())
    saved = layer.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in plain.state_dict().items())
    layer.experts.write(torch.zeros(64, 2, plain.experts.dim))
    assert not layer(x).any()


def test_the_host_waits_once_for_rows_that_are_there(place: RowPlace) -> None:
    found = table(place, 8)
    RowAdamW(found.parameters(), lazy=True)
    looked_up(found, [3, 1, 2]).sum().backward()  # whose gradient waits for a step
    with torch.no_grad(), HostReads() as reads:
        cache_of(found).bring(torch.tensor([[2, 2, 1]]), training=True)
    assert reads.count == 1


def test_what_cannot_be_is_refused(place: RowPlace) -> None:
    layer = cached(place)
    experts = layer.experts
    for call, word in {
        (lambda: experts.resize(999), "resized"),
        (lambda: experts.select(torch.arange(3)), "renumbered or cut"),
        (lambda: experts.convert_rows("int8"), "converted"),
        (lambda: copy.deepcopy(layer), "copied or pickled"),
        (lambda: pickle.dumps(layer), "copied or pickled"),
        (lambda: experts.to(torch.float64), "moved to cpu, or be torch.float64"),
        (lambda: layer.state_dict(keep_vars=True), "saved with keep_vars=True"),
        (lambda: experts._replicate_for_data_parallel(), "replicated"),
    }:
        with pytest.raises(ValueError, match=f"a table that a device caches cannot be {word}"):
            call()
    for read in (experts.read, lambda: experts.gather(torch.tensor([3]))):
        with pytest.raises(ValueError, match=r"mixed with gradients, and read without: call .* within"):
            read()
    with pytest.raises(RuntimeError, match=r"no transforms of torch\.func"):
        torch.func.vmap(lambda ids: layer.experts.mix(torch.ones(1, 1), ids[None, None], torch.ones(1, 16)))(
            torch.arange(3)
        )
    with pytest.raises(RuntimeError, match="trained by RowAdamW alone"):  # a dense gradient
        layer(torch.randn(2, 16)).sum().backward()
    with pytest.raises(ValueError, match="not have its rows on this host"):
        cache_tables(layer, CPU, 9)
    with pytest.raises(ValueError, match="an optimizer of tables with a cache on a device is not copied"):
        copy.deepcopy(trainer(layer))
    with pytest.raises(ValueError, match="experts that a device caches have no place of their own"):
        freeze_grown(layer, ["rows"], before=100)
    first, second = mapped(place), mapped(place)
    second.experts.rows = first.experts.rows
    with pytest.raises(ValueError, match="experts has the rows of another table"):
        cache_tables(second, CPU, 9)
    trainer(first)
    with pytest.raises(ValueError, match="or in training: cache a model's tables before"):
        cache_tables(first, CPU, 9)
    loaded = peer()
    cache_tables(loaded, CPU, A_BATCH)
    loaded.experts.rows.requires_grad_()
    optimizer = trainer(loaded, fused=True)
    with pytest.raises(RuntimeError, match="rows of a loaded model are read alone"):
        step(loaded, optimizer, 0)


def test_a_row_that_cannot_be_written_back_stays(place: RowPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, found = table(None, 0), table(place, 3)
    for each in (plain, found):
        optimizer = RowAdamW(each.parameters(), lr=0.1)
        looked_up(each, [1, 2]).square().sum().backward()
        optimizer.step()

    def full(ids: Tensor | None) -> None:
        raise OSError(28, "No space left on device")

    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(cache_of(found).home, "before_change", full)
            with pytest.raises(OSError, match="No space left"):
                found.gather(torch.tensor([5, 6, 7]))
        assert torch.equal(found.gather(torch.tensor([1, 2])), plain.gather(torch.tensor([1, 2])))
        assert torch.equal(found.read(), plain.read())


def test_gradient_checkpointing_and_a_memory_have_the_same_bits(place: RowPlace) -> None:
    def memory() -> ProductKeyMemory:
        torch.manual_seed(1)
        return ProductKeyMemory(16, num_values=64, heads=2, values_per_head=2, key_dim=8)

    plain = memory()
    with tables_as(mapped_in(place)):
        layer = memory()
    cache_tables(layer, CPU, 30)
    optimizer, reference = RowAdamW(layer.parameters(), lr=0.01), RowAdamW(plain.parameters(), lr=0.01)
    for number in range(4):
        x = torch.randn(6, 16, generator=torch.Generator().manual_seed(number))
        for each, own in ((layer, optimizer), (plain, reference)):
            own.zero_grad()
            checkpoint(each, x, use_reentrant=False).square().sum().backward()
            own.step()
    with torch.no_grad():
        assert torch.equal(layer.values.read(), plain.values.read())
