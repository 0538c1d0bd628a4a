"""What every test starts from: one thread, no network, fixed seeds, poisoned memory."""

import os

# Set before torch is imported, and inherited by processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import importlib.util
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

import peerlm.testing

from .models import Build, build

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tables", choices=("whole", "two-pieces"), default="whole", help="the class of which tests make tables"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "whole_tables(reason): looks at how `Table` itself keeps its rows")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as numerical what may reach the kernels, which round differently on every SIMD target.

    That is every test of a file that imports torch or compares approximately.
    """
    modules = {item.module for item in items if isinstance(item, pytest.Function)}
    numerical = {m for m in modules if hasattr(m, "torch") or "pytest.approx" in Path(m.__file__).read_text("utf-8")}
    for item in items:
        if isinstance(item, pytest.Function) and item.module in numerical:
            item.add_marker("numerical")


def pytest_runtest_setup(item: pytest.Item) -> None:
    marker = item.get_closest_marker("whole_tables")
    if marker is not None and item.config.getoption("--tables") != "whole":
        pytest.skip(marker.args[0])


@pytest.fixture(autouse=True, scope="session")
def tables(request: pytest.FixtureRequest) -> Iterator[None]:
    """With `--tables two-pieces` every layer of a test has tables of another class, `two_pieces.py`."""
    from peerlm.layers.table import tables_as

    if request.config.getoption("--tables") == "whole":
        yield
        return
    with tables_as(two_pieces()):
        yield


def two_pieces() -> type:
    if "two_pieces" not in sys.modules:
        spec = importlib.util.spec_from_file_location("two_pieces", Path(__file__).with_name("two_pieces.py"))
        sys.modules["two_pieces"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["two_pieces"])
    return sys.modules["two_pieces"].TwoPieces


# Examples share the cores with other tests, so that a slow one is no failure.
settings.register_profile("peerlm", deadline=None)
settings.load_profile("peerlm")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002, libraries draw from the global generator
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN or the largest integer, as deterministic mode does."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def float64() -> Iterator[None]:
    """What the test builds is in float64: equal to 1e-7, on any machine, where it is equal in exact arithmetic."""
    with peerlm.testing.float64():
        yield


@pytest.fixture(autouse=True, scope="session")
def own_heap() -> Iterator[None]:
    """Commands that a test calls keep freed memory in a process of theirs; this one gives it back, as tests expect."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("peerlm.cli", "peerlm_studies.script"):
            patch.setattr(f"{module}.keep_freed_memory", lambda: False)
        yield


@pytest.fixture
def new_model() -> Build:
    """A function: the name of an architecture, and settings that differ -> a new model."""
    return build
