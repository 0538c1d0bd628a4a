"""Tables in mapped files have the bits of tables in memory, go back to checkpoints, and refuse what they cannot do."""

import copy
import pickle
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from peerlm import PEER, UserError
from peerlm.growth import grow
from peerlm.layers import ProductKeyMemory, Table
from peerlm.layers.mapped import file as mapped_file
from peerlm.layers.mapped import store as mapped_store
from peerlm.layers.mapped.file import PAGE, MappedFile
from peerlm.layers.mapped.place import RowPlace
from peerlm.layers.mapped.table import MappedTable, mapped_in
from peerlm.layers.mapped.undo import MAGIC, UndoLog, read_undo
from peerlm.layers.table import tables_as
from peerlm.model import PeerConfig, PeerForCausalLM
from peerlm.ops.row_keeping import rows_stay_in_files
from peerlm.ops.row_updates import rows_as_they_are
from peerlm.optim import RowAdamW

Usage = namedtuple("Usage", "total used free")
pytestmark = pytest.mark.whole_tables("makes tables in files and tables in memory itself")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[RowPlace]:
    place = RowPlace(tmp_path / "rows", owner="run")
    yield place
    place.close()


def peer(**options: Any) -> PEER:
    torch.manual_seed(0)
    settings = {"num_experts": 256, "heads": 2, "experts_per_head": 4, "key_dim": 8, "query_norm": "none", **options}
    return PEER(16, **settings)


def mapped(place: RowPlace, **options: Any) -> PEER:
    with tables_as(mapped_in(place)):
        return peer(**options)


def reopened(place: RowPlace) -> RowPlace:
    """As another process opens the files after this one was killed."""
    place.close()
    return RowPlace(place.folder, owner="run", resume=True)


def step(layer: torch.nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    layer.train()
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(number))
    optimizer.zero_grad()
    layer(x).square().sum().backward()
    optimizer.step()


def row_state(layer: PEER, optimizer: RowAdamW) -> dict[str, torch.Tensor]:
    """All that is kept of rows, as it is."""
    with torch._C.DisableTorchFunctionSubclass():
        rows = {"rows": layer.experts.rows.data.clone()}
    if layer.experts.scales is not None:
        rows["scales"] = layer.experts.scales.clone()
    state = optimizer.state.get(layer.experts.rows, {})
    return rows | {key: value.clone() for key, value in state.items() if isinstance(value, torch.Tensor)}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name].view(torch.uint8), value.view(torch.uint8)), name


MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "exact": ({}, {}),
    "lazy": ({}, {"lazy": True}),
    "row-wise": ({}, {"row_wise": True}),
    "fused": ({}, {"fused": True}),
    "bfloat16": ({"row_format": "bfloat16"}, {"lazy": True, "row_wise": True, "state_dtype": torch.bfloat16}),
    "no momentum": ({"row_format": "bfloat16"}, {"betas": (0.0, 0.99), "row_wise": 8, "fused": True}),
    "int8": ({"row_format": "int8"}, {"betas": (0.0, 0.99), "row_wise": True, "fused": True}),
    "gated": ({"gated": True}, {}),
}


def trainer(layer: PEER, **settings: Any) -> RowAdamW:
    if layer.experts.scales is not None:
        layer.experts.train_in_place()
    return RowAdamW(layer.parameters(), **{"lr": 0.01, "weight_decay": 0.1, **settings})


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_was_killed_goes_back_to_its_checkpoint_and_ends_with_the_bits_of_tables_in_memory(
    mode: str, place: RowPlace
) -> None:
    options, settings = MODES[mode]
    plain, layer = peer(**options), mapped(place, **options)
    optimizer, reference = trainer(layer, **settings), trainer(plain, **settings)
    assert_same(row_state(layer, optimizer), row_state(plain, reference))
    for number in range(4):
        step(layer, optimizer, number), step(plain, reference, number)
    record = place.prepare()
    place.begin(record)
    saved = row_state(plain, reference)
    with rows_as_they_are(), rows_stay_in_files():
        rest = copy.deepcopy((dict(layer.state_dict()), optimizer.state_dict()))
    assert "experts.rows" not in rest[0]
    kept = {"exp_avg", "exp_avg_sq", "moments_step", "weights_step"}
    states = rest[1]["state"].items()
    values = {
        index: {k: v for k, v in state.items() if k not in kept or "number" not in state} for index, state in states
    }
    for number in range(4, 9):
        step(layer, optimizer, number), step(plain, reference, number)
    assert_same(row_state(layer, optimizer), row_state(plain, reference))
    assert not torch.equal(row_state(layer, optimizer)["rows"], saved["rows"])

    again = reopened(place)
    layer = mapped(again, **options)
    optimizer = trainer(layer, **settings)
    again.restore(record)
    with rows_stay_in_files():
        layer.load_state_dict(rest[0], strict=False)
        optimizer.load_state_dict({**rest[1], "state": values})
    assert_same(row_state(layer, optimizer), saved)
    for number in range(4, 9):
        step(layer, optimizer, number)
    assert_same(row_state(layer, optimizer), row_state(plain, reference))
    for module, trained in ((layer, optimizer), (plain, reference)):
        trained.catch_up()
        module.eval()
    x = torch.randn(5, 16)
    assert torch.equal(layer(x), plain(x))
    again.close()


def test_a_sweep_and_a_change_of_betas_are_taken_back_too(place: RowPlace) -> None:
    layer = mapped(place)
    optimizer = trainer(layer)
    for number in range(3):
        step(layer, optimizer, number)
    record = place.prepare()
    place.begin(record)
    saved = row_state(layer, optimizer)
    with rows_as_they_are():  # no sweep logs them before
        layer.experts.write(torch.ones(2, 2, 16), 7)
    assert layer.experts._store._logged.nonzero().flatten().tolist() == [7, 8]
    optimizer.catch_up()
    optimizer.param_groups[-1]["betas"] = optimizer.param_groups[0]["betas"] = (0.8, 0.999)
    step(layer, optimizer, 3)
    again = reopened(place)
    layer = mapped(again)
    again.restore(record)
    store = layer.experts._store
    assert store is not None
    found = {name: file.tensor for name, file in store.files.items()}
    assert_same(found, {name: value for name, value in saved.items() if name in found})
    assert len(found) == 5
    again.close()


def test_older_checkpoints_are_reached_until_they_are_forgotten(place: RowPlace) -> None:
    layer = mapped(place)
    optimizer = trainer(layer, lazy=True)
    records, states = [], []
    for number in range(4):
        step(layer, optimizer, number)
        records.append(place.prepare())
        place.begin(records[-1])
        states.append(row_state(layer, optimizer)["rows"])
    place.forget(records[1]["mark"])
    place.prepare()  # of a checkpoint that was not completed
    step(layer, optimizer, 9)
    again = reopened(place)
    layer = mapped(again)
    with pytest.raises(UserError, match="cannot go back to this checkpoint"):
        again.restore(records[0])
    again.restore(records[1])
    assert torch.equal(layer.experts.rows, states[1])
    again = reopened(again)
    layer = mapped(again)
    with pytest.raises(UserError, match="cannot go back"):  # the run has taken another way since
        again.restore(records[2])
    again.restore(records[1])
    assert torch.equal(layer.experts.rows, states[1])
    again.close()


def test_a_record_that_was_cut_off_is_left_out_and_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "undo"
    log = UndoLog(path)
    for number in range(3):
        log.append(torch.tensor([number, 5]), {"rows": torch.full((2, 3), number, dtype=torch.uint8)})
    log.close()
    whole = path.read_bytes()
    found = list(read_undo(path))
    assert [ids.tolist() for ids, _ in found] == [[0, 5], [1, 5], [2, 5]]
    assert found[2][1]["rows"].tolist() == [[2, 2, 2]] * 2
    last = whole.rindex(MAGIC)
    for length in (last, last + 3, last + 40, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert len(list(read_undo(path))) == 2
    path.write_bytes(whole[:last] + bytes(len(whole) - last))
    assert len(list(read_undo(path))) == 2
    second = whole.index(MAGIC, 1)
    for place in (second + 2, second + 12, second + 70):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match="damaged"):
            list(read_undo(path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_rows_are_drawn_in_parts_as_at_once(dtype: str, place: RowPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peerlm.layers.mapped.table._ELEMENTS_AT_ONCE", 50)

    def made() -> Table:
        torch.manual_seed(0)
        table = Table(201, 5, row_format=dtype)
        table.fill_normal(0.5)
        return table

    plain = made()
    told: list[int] = []

    def begins_drawing(size: int) -> Any:
        told.append(-size)
        return told.append

    place.begins_drawing = begins_drawing
    with tables_as(mapped_in(place)):
        table = made()
    assert len(list(table._parts_to_draw())) > 3
    assert len(told) > 4
    assert told[0] == -201 * table.row_bytes
    assert sum(told) == 0
    following = torch.randn(3)
    assert torch.equal(plain.read(), table.read())
    made()
    assert torch.equal(torch.randn(3), following)


def test_layers_grow_and_shrink_in_files_as_in_memory(place: RowPlace) -> None:
    settings = {"pairing": "shells"}
    plain, layer = peer(**settings), mapped(place, **settings)
    optimizer, reference = trainer(layer), trainer(plain)
    record: Any = None
    for number in range(6):
        step(layer, optimizer, number), step(plain, reference, number)
        if number == 1:
            record = place.prepare()
            place.begin(record)
            saved = {name: file.tensor.clone() for name, file in layer.experts._store.files.items()}
        if number == 2:
            for each, own in ((layer, optimizer), (plain, reference)):
                grow(each, 20**2, optimizer=own)
    assert layer.experts.num_rows == 400
    assert_same(row_state(layer, optimizer), row_state(plain, reference))
    store = layer.experts._store
    assert store is not None
    assert store.holds("exp_avg", optimizer.state[layer.experts.rows]["exp_avg"])
    with pytest.raises(RuntimeError, match="belong to a checkpoint"):
        layer.experts.select(torch.arange(5))
    again = reopened(place)
    small = mapped(again, **settings)
    again.restore(record)
    assert small.experts._store is not None
    assert_same({name: file.tensor for name, file in small.experts._store.files.items()}, saved)
    again.close()


def test_rows_are_chosen_into_other_files(tmp_path: Path) -> None:
    place = RowPlace(tmp_path / "rows")
    layer, plain = mapped(place, row_format="int8").experts, peer(row_format="int8").experts
    ids = torch.tensor([7, 3, 250])
    layer.select(ids), plain.select(ids)
    assert torch.equal(layer.read(), plain.read())
    layer.resize(9), plain.resize(9)
    assert torch.equal(layer.read(), plain.read())
    place.close()


def test_a_state_dict_has_the_rows_and_loads_in_both_kinds(place: RowPlace) -> None:
    layer, plain = mapped(place), peer()
    optimizer, reference = trainer(layer), trainer(plain)
    for number in range(3):
        step(layer, optimizer, number)
    saved = copy.deepcopy((dict(layer.state_dict()), optimizer.state_dict()))
    plain.load_state_dict(saved[0]), reference.load_state_dict(copy.deepcopy(saved[1]))
    other = mapped(place)
    again = trainer(other)
    other.load_state_dict(saved[0]), again.load_state_dict(saved[1])
    store = other.experts._store
    assert store is not None
    assert store.holds("exp_avg", again.state[other.experts.rows]["exp_avg"])
    for number in range(3, 6):
        step(layer, optimizer, number), step(plain, reference, number), step(other, again, number)
    assert_same(row_state(layer, optimizer), row_state(plain, reference))
    assert_same(row_state(other, again), row_state(plain, reference))


def test_copies_and_pickles_are_in_memory(place: RowPlace) -> None:
    layer = mapped(place)
    for found in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert not isinstance(found.experts, MappedTable)
        assert torch.equal(found.experts.rows, layer.experts.rows)
        with torch.no_grad():
            found.experts.rows.zero_()
    assert layer.experts.rows.any()


def test_another_dtype_is_another_file_and_a_gpu_is_refused(place: RowPlace) -> None:
    layer, plain = mapped(place), peer()
    layer.to(torch.bfloat16), plain.to(torch.bfloat16)
    store = layer.experts._store
    assert store is not None
    assert store.holds("rows", layer.experts.rows)
    assert torch.equal(layer.experts.rows, plain.experts.rows)
    with pytest.raises(ValueError, match="stay on the CPU"):
        layer.experts._apply(lambda tensor: _Elsewhere(tensor.shape, tensor.dtype))  # type: ignore[arg-type, return-value]


def test_another_dtype_with_sparse_gradients_of_rows(place: RowPlace) -> None:
    layer = mapped(place)
    rows = layer.experts.rows
    rows.grad = torch.sparse_coo_tensor(
        torch.tensor([[3]]), torch.ones(1, *rows.shape[1:]), rows.shape, check_invariants=True
    )
    layer.to(torch.float64)
    gradient = layer.experts.rows.grad
    assert gradient is not None
    assert gradient.dtype == torch.float64
    assert gradient.to_dense()[3].eq(1).all()


class _Elsewhere:
    """A tensor on a GPU, as far as it is asked."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        self.shape, self.dtype, self.device = shape, dtype, torch.device("cuda", 0)


def test_two_processes_never_train_one_folder(place: RowPlace, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="another process trains the tables"):
        RowPlace(place.folder, owner="run")
    mapped(place)
    place.close()
    with pytest.raises(UserError, match="has the tables of run"):
        RowPlace(place.folder, owner="other run")
    with pytest.raises(UserError, match="no tables of a run to resume"):
        RowPlace(tmp_path / "empty", resume=True)
    (tmp_path / "else").mkdir()
    (tmp_path / "else/file").touch()
    with pytest.raises(UserError, match="is not empty"):
        RowPlace(tmp_path / "else")
    assert (tmp_path / "else/file").exists()


def test_files_that_are_missing_or_short_are_named(place: RowPlace) -> None:
    layer = mapped(place)
    record = place.prepare()
    rows = place.folder / "000/rows.safetensors"
    content = rows.read_bytes()
    rows.write_bytes(content[:-1])
    again = reopened(place)
    with pytest.raises(UserError, match=r"rows\.safetensors has 36,863 bytes, and .* takes 36,864"):
        mapped(again)
    rows.unlink()
    again = reopened(again)
    with pytest.raises(UserError, match=r"rows\.safetensors .* is missing"):
        mapped(again)
    rows.write_bytes(content)
    again = reopened(again)
    with pytest.raises(UserError, match="other rows than this model"):
        mapped(again, num_experts=225), again.restore(record)
    again = reopened(again)
    layer = mapped(again)
    with pytest.raises(RuntimeError, match="before it is restored"):
        layer.experts.write(torch.zeros(1, 2, 16))
    with pytest.raises(UserError, match="0 tables in files, and this model 1"):
        again.restore(record | {"tables": []})
    again.close()


def test_a_disk_without_room_is_refused_before_a_file_is_made(place: RowPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: Usage(0, 0, 30_000))
    with pytest.raises(UserError, match=r"the disk of .* has 0\.0286 MiB free .* a file of 0\.0312 MiB is to be made"):
        mapped(place)


def test_an_optimizer_that_changes_rows_unseen_is_refused_at_a_checkpoint(place: RowPlace) -> None:
    layer = mapped(place)
    assert isinstance(layer.experts, MappedTable)
    with pytest.raises(RuntimeError, match="under RowAdamW alone"):
        layer.experts.settle()
    trainer(layer)
    layer.experts.settle()


def test_pages_not_used_lately_are_given_back_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_store, "_WORTH_WATCHING", 0)
    monkeypatch.setattr(mapped_file, "REGION", 1 << 21)  # the system may keep so much together
    monkeypatch.setattr("peerlm.layers.mapped.place.REGION", 1 << 21)
    place = RowPlace(tmp_path / "rows", cache=1 << 21)
    with tables_as(mapped_in(place)):
        table = Table(1 << 15, 64)  # 8 MiB
    table.fill_normal(1.0)
    assert place.resident_bytes() <= 1 << 22
    plain = Table(1 << 15, 64)
    torch.manual_seed(3)
    plain.fill_normal(1.0)
    torch.manual_seed(3)
    table.fill_normal(1.0)
    for number in range(20):
        ids = torch.randint(1 << 15, (256, 4), generator=torch.Generator().manual_seed(number))
        assert torch.equal(table.gather(ids), plain.gather(ids))
        assert place.resident_bytes() <= 1 << 22
    assert torch.equal(table.read(), plain.read())
    place.close()


def test_a_model_writes_the_initial_rows_once(place: RowPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_experts": 64, "heads": 1, "experts_per_head": 2, "key_dim": 8}

    def made() -> PeerForCausalLM:
        torch.manual_seed(0)
        return PeerForCausalLM(PeerConfig(**sizes, ffw_layers=["peer", "dense"], peer=experts))

    plain, written, write = made(), [], MappedFile.write

    def watched(file: MappedFile, first: int, values: torch.Tensor) -> None:
        written.append(values.nbytes)
        write(file, first, values)

    monkeypatch.setattr(MappedFile, "write", watched)
    with tables_as(mapped_in(place)):
        model = made()
    assert sum(written) == 64 * 2 * 16 * 4
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_pages_that_were_written_together_are_given_back_together(tmp_path: Path) -> None:
    file = MappedFile.create(tmp_path / "rows.safetensors", (1 << 12, 256), torch.float32)  # 4 MiB
    values = torch.randn(1 << 12, 256)
    file.write(0, values)
    file.recent[::8] = True
    file.give_back(0)
    assert file.resident_bytes() == 0
    file.write(0, values)
    some = torch.arange(0, 1 << 12, 64)
    file.use(some)  # single pages, for a change of one would write all that it is kept with
    assert 0 < file.resident_bytes() <= len(some) * 2 * PAGE
    file.give_back(0)
    assert file.resident_bytes() > 0
    file.give_back(0)
    assert file.resident_bytes() == 0
    assert torch.equal(file.tensor, values)


def test_processes_share_a_saved_table_through_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "rows.safetensors"
    file = MappedFile.create(path, (3, 2), torch.float32)
    file.tensor.copy_(torch.arange(6).view(3, 2))
    assert file.link(tmp_path / "model.safetensors", "layer.rows")
    assert path.samefile(tmp_path / "model.safetensors")
    script = (
        "import sys; from safetensors import safe_open\n"
        "with safe_open(sys.argv[1], 'numpy') as f: print(f.get_tensor('layer.rows').tolist())"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "model.safetensors"], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]"


def test_a_memory_and_packs_are_kept_in_files_as_in_memory(place: RowPlace) -> None:
    def memory() -> ProductKeyMemory:
        torch.manual_seed(1)
        return ProductKeyMemory(16, num_values=64, heads=2, values_per_head=2, key_dim=8)

    plain = memory()
    with tables_as(mapped_in(place)):
        layer = memory()
    optimizer, reference = RowAdamW(layer.parameters(), lr=0.01), RowAdamW(plain.parameters(), lr=0.01)
    for number in range(3):
        step(layer, optimizer, number), step(plain, reference, number)
    assert torch.equal(layer.values.read(), plain.values.read())
    like = layer.values.like(torch.zeros(3, 16), trained=True)
    assert not isinstance(like, MappedTable)


def test_rows_of_another_table_are_shared_and_others_copied(place: RowPlace) -> None:
    first, second = mapped(place), mapped(place)
    second.experts.rows = first.experts.rows
    assert second.experts.rows is first.experts.rows
    loaded = torch.nn.Parameter(torch.ones_like(first.experts.rows))
    first.experts.rows = loaded
    assert first.experts.rows is not loaded
    assert torch.equal(first.experts.rows, loaded)
