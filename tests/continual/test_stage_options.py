"""`peerlm learn`: its options become a configuration, its result a table or JSON, mistakes one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from peerlm.cli import main
from peerlm.cli.stage_options import learn_config
from peerlm.continual import LearnConfig, StageConfig
from peerlm.errors import UserError
from peerlm.train import BudgetConfig


def config_of(**changes: Any) -> LearnConfig:
    options: dict[str, Any] = {
        "run": "out",
        "model": "runs/a",
        "text": ["books/code.txt.xz", "law=laws"],
        "heldout": [],
        "settings": [],
        "budget": {"tokens": None, "steps": None},
        "memory": {},
    }
    return learn_config(**(options | changes))


def test_texts_are_named_by_their_files_unless_told() -> None:
    config = config_of(heldout=["law=h.txt", "background=b.txt"], settings=["sub_keys=4"], method="grow")
    assert config.stages == (
        StageConfig(name="code", text=("books/code.txt.xz",)),
        StageConfig(name="law", text=("laws",), heldout="h.txt"),
    )
    assert config.memory.heldout == "b.txt"
    assert config.settings == {"sub_keys": 4}
    assert config.budget is None
    assert config_of(budget={"tokens": None, "steps": 7}).budget == BudgetConfig(steps=7)


def test_a_path_with_an_equals_sign_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("seed=0", "laws"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "new.txt").write_text("text")
    (tmp_path / "a=b.txt").write_text("text")
    texts = ["seed=0/new.txt", "law=laws/new.txt", "./x=1/y.txt", "a=b.txt", str(tmp_path / "seed=0")]
    config = config_of(text=texts, heldout=["a=b=h=1.txt", "law=h.txt"])
    assert config.stages == (
        StageConfig(name="new", text=("seed=0/new.txt",)),
        StageConfig(name="law", text=("laws/new.txt",), heldout="h.txt"),
        StageConfig(name="y", text=("./x=1/y.txt",)),
        StageConfig(name="a=b", text=("a=b.txt",), heldout="h=1.txt"),
        StageConfig(name="seed=0", text=(texts[-1],)),
    )
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(
        UserError, match=r"--text a=b\.txt is a path, and so is b\.txt: write \./a=b\.txt, or a=\./b\.txt"
    ):
        config_of(text=["a=b.txt"])
    assert config_of(text=["a=./b.txt"]).stages == (StageConfig(name="a", text=("./b.txt",)),)
    assert config_of(text=["./a=b.txt"]).stages == (StageConfig(name="a=b", text=("./a=b.txt",)),)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heldout": ["h.txt"]}, r"--heldout h\.txt: write NAME=FILE, with a NAME of code, law, background"),
        ({"heldout": ["laws=h.txt"]}, "with a NAME of code, law"),
        ({"budget": {"tokens": 5, "steps": 7}}, "budget sets steps, tokens"),
        ({"settings": ["rank"]}, "cannot read the setting 'rank'"),
        ({"method": "magic"}, "method = 'magic': expected one of 'full', 'lora'"),
    ],
)
def test_options_without_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_of(**changes)


def test_the_command(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = ["--text", str(texts / "code.txt"), "--output", str(tmp_path / "out")]
    fixed = ["learn", str(texts / "peer"), *places, "--steps", "2", "--context", "16"]

    def run(*arguments: str) -> int:
        with pytest.raises(SystemExit) as stop:
            main([*fixed, *arguments])
        return int(stop.value.code or 0)

    assert run("--json=-") == 0
    before, after = json.loads(capsys.readouterr().out)
    assert before["stage"] is None
    assert after["stage"] == "code"
    assert after["steps"] == 2
    assert run() == 2
    assert "exists already: --resume it" in capsys.readouterr().err
    assert run("--resume") == 0
    assert "after code" in capsys.readouterr().out
    assert run("--kl", "1", "--resume") == 2
    assert capsys.readouterr().err.count("\n") == 1
