"""Commands whose extra is not installed."""

import subprocess
import sys

import pytest

# A fresh interpreter in which the packages of the extra `studies` cannot be found.
WITHOUT = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in {names} else find_spec(name, *rest)
from peerlm.cli import main
main({arguments})
"""


def without(names: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
    code = WITHOUT.format(names=set(names) or "()", arguments=list(arguments))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [[], ["recipes/demo.toml", "--set", "seeds=[0]"], ["--no-such-option"]])
def test_a_study_without_its_packages_says_what_to_install(arguments: list[str]) -> None:
    result = without(("matplotlib", "scipy"), "compare", *arguments)
    assert result.returncode == 2
    assert result.stderr == (
        'error: `peerlm compare` is a study and needs matplotlib, scipy: pip install "peerlm[studies]"\n'
    )


@pytest.mark.parametrize("names", [(), ("scipy",)])
def test_help_lists_studies_only_where_they_can_run(names: tuple[str, ...]) -> None:
    result = without(names, "--help")
    assert result.returncode == 0
    listed = {line.split()[1] for line in result.stdout.splitlines() if line.startswith("│ ") and len(line.split()) > 1}
    assert "train" in listed
    assert ({"compare", "isoflop", "plan", "report"} <= listed) == (not names)


def test_serving_without_its_packages_says_what_to_install() -> None:
    result = without(("fastapi", "uvicorn"), "serve", "runs/a")
    assert result.returncode == 2
    assert result.stderr == 'error: `peerlm serve` needs fastapi, uvicorn: pip install "peerlm[serve]"\n'
