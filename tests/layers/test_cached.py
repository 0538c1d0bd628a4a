"""Tables with places on a device have the bits of tables in memory, whatever comes and goes, and refuse what they must.

The device is the CPU, on which all is done as on a GPU.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peerlm import PEER
from peerlm.layers.mapped import cache as mapped_cache
from peerlm.layers.mapped.cached import cache_tables
from peerlm.layers.mapped.place import RowPlace
from peerlm.ops.row_keeping import rows_stay_in_files
from peerlm.ops.row_updates import rows_as_they_are
from peerlm.optim import RowAdamW

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
