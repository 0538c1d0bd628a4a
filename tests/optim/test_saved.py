"""An optimizer's state in a file: it comes back whole, and stale rows of the model beside it catch up."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from peerlm import PEER
from peerlm.ops.row_updates import rows_as_they_are
from peerlm.optim import RowAdamW, parameter_groups
from peerlm.optim.saved import FILE, catch_up_saved, load_state, save_state


def trained(steps: int) -> tuple[PEER, RowAdamW]:
    torch.manual_seed(0)
    layer = PEER(8, num_experts=256, heads=1, experts_per_head=2, key_dim=4)
    optimizer = RowAdamW(parameter_groups(layer), lr=1e-2)
    for _ in range(steps):
        layer(torch.randn(3, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return layer, optimizer


def test_the_state_comes_back_whole(tmp_path: Path) -> None:
    layer, optimizer = trained(3)
    save_state(optimizer, tmp_path, layer)
    _, other = trained(0)
    load_state(other, tmp_path)
    expected, found = optimizer.state_dict()["state"], other.state_dict()["state"]
    assert expected.keys() == found.keys()
    for index, entries in expected.items():
        for key, value in entries.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(found[index][key])), key


def test_a_loaded_state_is_where_the_parameters_are(tmp_path: Path) -> None:
    layer, optimizer = trained(2)
    save_state(optimizer, tmp_path, layer)
    with torch.device("meta"):
        elsewhere = PEER(8, num_experts=256, heads=1, experts_per_head=2, key_dim=4)
    other = RowAdamW(parameter_groups(elsewhere), lr=1e-2)
    load_state(other, tmp_path)
    on_host = ("learning_rates", "log_keep")
    for state in other.state.values():
        assert all(
            value.device.type == "meta"
            for name, value in state.items()
            if isinstance(value, torch.Tensor) and name not in on_host
        )


def test_stale_rows_of_a_model_catch_up_as_its_own_optimizer_has_them(tmp_path: Path) -> None:
    layer, optimizer = trained(6)
    with rows_as_they_are():
        assert save_state(optimizer, tmp_path, layer)
        stale = layer.experts.rows.detach().clone()
    other, _ = trained(0)
    with torch.no_grad():
        other.experts.rows.copy_(stale)
    catch_up_saved(other, tmp_path)
    optimizer.catch_up()
    assert not torch.equal(stale, layer.experts.rows)
    assert torch.equal(other.experts.rows, layer.experts.rows)


def test_a_state_that_owes_nothing_changes_nothing(tmp_path: Path) -> None:
    layer, optimizer = trained(6)
    assert not save_state(optimizer, tmp_path, layer)
    before = layer.experts.rows.detach().clone()
    catch_up_saved(layer, tmp_path)
    assert torch.equal(layer.experts.rows, before)


def test_the_state_of_another_model_is_refused(tmp_path: Path) -> None:
    layer, optimizer = trained(6)
    with rows_as_they_are():
        save_state(optimizer, tmp_path, layer)
    with pytest.raises(ValueError, match=r"state of a table experts\.rows, which the model does not have"):
        catch_up_saved(torch.nn.Linear(2, 2), tmp_path)


def test_a_state_without_names_is_refused_where_it_owes_updates(tmp_path: Path) -> None:
    layer, optimizer = trained(6)
    with rows_as_they_are():
        save_state(optimizer, tmp_path, layer)
    with safe_open(tmp_path / FILE, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    values = {key: value for key, value in json.loads(metadata["values"]).items() if not key.endswith(".name")}
    save_file(tensors, tmp_path / FILE, metadata={"values": json.dumps(values)})
    with pytest.raises(ValueError, match=r"does not name the tables whose rows are stale.*resume its run"):
        catch_up_saved(layer, tmp_path)
