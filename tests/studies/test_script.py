"""A module that is run as a command says what a user's mistake was."""

import sys

import pytest

from peerlm import UserError
from peerlm_studies.script import run_script


def fail(name: str) -> None:
    """Name what is not there."""
    raise UserError(f"there is no {name}")


def test_a_mistake_is_a_sentence_and_ends_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["module", "budget"])
    with pytest.raises(SystemExit) as stop:
        run_script(fail)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: there is no budget\n"
