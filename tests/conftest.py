"""What every test starts from: one thread, no network, fixed seeds, poisoned memory."""

import os

# Set before torch is imported, and inherited by processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings

import peerlm.testing

torch.set_num_threads(1)

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
    """Models that the test builds are in float64: what is equal in exact arithmetic is equal to 1e-7, on any machine."""
    with peerlm.testing.float64():
        yield


@pytest.fixture(autouse=True, scope="session")
def own_heap() -> Iterator[None]:
    """Commands that a test calls keep freed memory in a process of theirs; this one gives it back, as tests expect."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("peerlm.cli", "peerlm.experiments.script"):
            patch.setattr(f"{module}.keep_freed_memory", lambda: False)
        yield
