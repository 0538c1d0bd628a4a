"""The installed package: what importing it costs, its public names, version, and embedded corpus."""

import hashlib
import importlib.metadata
import importlib.resources
import re
import subprocess
import sys

import pytest
import torch

import peerlm


def modules_after(code: str) -> set[str]:
    """Names of the top-level packages that a fresh interpreter has imported after running `code`."""
    code += "; import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


@pytest.mark.parametrize("code", ["import peerlm", "from peerlm import PEER", "import peerlm.cli"])
def test_import_needs_no_library_of_models_or_data(code: str) -> None:
    assert not modules_after(code) & {"transformers", "datasets", "matplotlib", "tensorboard", "pyarrow"}


def test_importing_the_layer_loads_torch() -> None:
    assert "torch" not in modules_after("import peerlm")
    assert "torch" in modules_after("from peerlm import PEER")


@pytest.mark.parametrize("name", peerlm.__all__)
def test_public_name_resolves_and_is_listed(name: str) -> None:
    assert getattr(peerlm, name) is not None
    assert name in dir(peerlm)


def test_unknown_name_is_an_attribute_error_that_lists_the_known() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'PERR'; it has PEER, "):
        _ = peerlm.PERR


def test_layer_from_the_package_computes() -> None:
    x = torch.randn(2, 3, 8)
    assert peerlm.PEER(8, num_experts=16, heads=2, experts_per_head=2, key_dim=4)(x).shape == x.shape


def test_version_is_that_of_the_installed_distribution() -> None:
    assert peerlm.__version__ == importlib.metadata.version("peerlm")


def test_corpus_is_in_the_package_with_the_hash_that_its_readme_states() -> None:
    folder = importlib.resources.files("peerlm") / "corpus"
    readme = (folder / "README.md").read_text(encoding="utf-8")
    stated = re.search(r"\b[0-9a-f]{64}\b", readme)
    assert stated is not None
    assert hashlib.sha256((folder / "demo_corpus.txt.xz").read_bytes()).hexdigest() == stated[0]


def test_package_declares_its_types() -> None:
    assert (importlib.resources.files("peerlm") / "py.typed").is_file()
