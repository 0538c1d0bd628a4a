"""A prepared folder as a recipe: `peerlm prepare` names the command, and the command works."""

import json
import shlex
from pathlib import Path

import pytest

from peerlm.cli import main
from peerlm.data import Manifest
from peerlm.errors import UserError
from peerlm.train.recipe import load_recipe, read_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def test_it_is_the_recipe_of_the_demo_on_other_data(data: Path) -> None:
    demo = read_recipe(RECIPES / "train-demo.toml")
    starter = read_recipe(data)
    own = {"run": "runs/tokens", "data": {"folder": str(data), "context": 256, "batch_size": 8}}
    assert starter == demo | own
    assert load_recipe(data, ["data.context=32", "budget.steps=3"]).data.context == 32


def test_windows_are_no_longer_than_a_split(data: Path, tmp_path: Path) -> None:
    fields = json.loads((data / "manifest.json").read_text())
    for tokens in (40, 5):
        heldout = fields["splits"]["heldout"]
        heldout["tokens"], heldout["shards"] = tokens, [{**heldout["shards"][0], "items": tokens}]
        (tmp_path / "manifest.json").write_text(json.dumps(fields))
        if tokens == 40:
            assert read_recipe(tmp_path)["data"]["context"] == 40
    with pytest.raises(UserError, match=r"the heldout split of .* has 5 tokens, too few to train with: prepare more"):
        read_recipe(tmp_path)


@pytest.mark.parametrize("name", ["mine", "my own=text"])
def test_the_command_that_prepare_prints_trains(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "book.txt").write_text(
        "\n".join(f"Line {number} tells of {number * number} ships." for number in range(90))
    )
    (folder / "cover.png").write_bytes(b"png")

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        shown = capsys.readouterr()
        assert stop.value.code == 0, shown.err
        return shown.out

    shown = run("prepare", "text", "--output", f"data/{name}", "--vocab-size", "300")
    assert "read: 1 .txt\npassed over: 1 .png\n" in shown
    command = shown.strip().rpartition("Train on it: ")[2]
    words = shlex.split(command)
    assert words == ["peerlm", "train", f"data/{name}"]
    tiny = ("model.hidden_size=8", "model.num_hidden_layers=1", "model.peer.experts_per_head=16", "budget.steps=1")
    small = ("data.batch_size=1", "data.context=16", "eval.final_windows=1")
    report = json.loads(run(*words[1:], *(f"--set={setting}" for setting in (*tiny, *small)), "--json=-"))
    assert report["run"] == f"runs/{name}"
    assert report["steps"] == 1
    assert Manifest.read(f"data/{name}").splits["heldout"].documents == 1
