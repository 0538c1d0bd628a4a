import json
import shutil

import pytest
import torch

from peerlm.cli import main
from peerlm.data.tokenizer import open_tokenizer
from peerlm.errors import UserError
from peerlm.evaluate import load_model
from peerlm.evaluate.loading import model_folder, trained_context
from peerlm.layers.mapped.cached import CachedTable


@pytest.fixture
def run(saved, tmp_path):
    """A run with two checkpoints, the older one of another model, and no final model yet."""
    run = tmp_path / "run"
    for step in (2, 10):
        shutil.copytree(saved, run / "checkpoints" / f"step-{step:08d}")
    (run / "checkpoints" / ".partial-step-00000012").mkdir()
    (run / "config.json").write_text(json.dumps({"run": "run", "data": {"context": 24}}))
    return run


def test_a_saved_model_comes_back(saved, model, tokenizer):
    loaded, loaded_tokenizer = load_model(saved)
    tokens = torch.arange(12)[None]
    assert not loaded.training
    assert torch.equal(loaded(tokens).logits.cpu(), model(tokens).logits)
    assert loaded_tokenizer.get_vocab() == tokenizer.get_vocab()


def test_a_run_means_its_model_or_else_its_newest_checkpoint(run, saved):
    assert model_folder(run) == run / "checkpoints" / "step-00000010"
    assert model_folder(str(run / "checkpoints" / "step-00000002")).name == "step-00000002"
    shutil.copytree(saved, run / "model")
    assert model_folder(run) == run / "model"


def test_the_context_is_the_one_of_the_run(run, saved):
    shutil.copytree(saved, run / "model")
    for folder in (run, run / "model", run / "checkpoints" / "step-00000002"):
        assert trained_context(folder) == 24
    assert trained_context(saved) is None
    assert trained_context("/") is None


def test_a_folder_without_a_model_is_named(run, tmp_path):
    with pytest.raises(UserError, match="absent is not a folder; name a run or a saved model"):
        load_model(tmp_path / "absent")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="run is neither a run with a model/ or a checkpoint nor a saved model"):
        load_model(run)


def cut_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def spoil_header(folder):
    (folder / "model.safetensors").write_bytes(b"not safetensors at all")


def drop_weights(folder):
    (folder / "model.safetensors").unlink()


def forget_a_tensor(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def add_a_tensor(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.experts"] = weights["model.norm.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))


def change_kind(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "pear"}))


def spoil_a_size(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": "wide"}))


def drop_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def enlarge_tokenizer(folder):
    tokenizer = open_tokenizer(folder)
    tokenizer.add_tokens([f"word{number}" for number in range(50)])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_weights, r"holds no model that can be read \(.*\); restore it"),
        (spoil_header, r"holds no model that can be read \(.*\); restore it"),
        (drop_weights, r"holds no model that can be read \(.*\); restore it"),
        (forget_a_tensor, r"lacks weights, such as model\.norm\.weight; restore it"),
        (add_a_tensor, r"has unknown weights, such as model\.layers\.0\.experts; restore it"),
        (change_shape, r"holds no model that can be read \(.*\); restore it"),
        (change_kind, r"holds no model that can be read \(.*pear.*\); restore it"),
        (spoil_a_size, r"holds no model that can be read \(.*intermediate_size.*\); restore it"),
        (drop_tokenizer, "has no tokenizer"),
        (enlarge_tokenizer, r"has 3\d\d tokens, but its model knows 300; restore the tokenizer"),
    ],
)
def test_a_damaged_model_is_named(saved, tmp_path, damage, message):
    folder = tmp_path / "damaged"
    shutil.copytree(saved, folder)
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "command", [["generate", "{saved}", "The"], ["eval", "{saved}", "{text}"], ["serve", "{saved}", "--port=0"]]
)
def test_commands_refuse_rows_on_a_device_that_has_all(saved, tmp_path, monkeypatch, capsys, command):
    monkeypatch.setattr("peerlm.evaluate.loading.automatic_device", lambda: torch.device("cpu"))
    (tmp_path / "a.txt").write_text("The lamp was lit.")
    with pytest.raises(SystemExit, match="2"):
        main([each.format(saved=saved, text=tmp_path / "a.txt") for each in [*command, "--device-rows=4000"]])
    assert capsys.readouterr().err == (
        "error: device_rows is 4,000, but the model runs on cpu, where all rows are: leave it out\n"
    )


def test_rows_stay_on_the_host_when_a_device_has_places_for_some(saved, model, monkeypatch):
    monkeypatch.setattr("peerlm.evaluate.loading.CACHING", ["cpu"])
    monkeypatch.setattr("peerlm.evaluate.loading.automatic_device", lambda: torch.device("cpu"))
    loaded, _ = load_model(saved, device_rows=40)
    table = loaded.model.layers[1].ffw.experts
    assert isinstance(table, CachedTable)
    assert len(table.rows) == 40 < table.num_rows
    tokens = torch.arange(4)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)
