"""Triton's kernels in its interpreter where there is no GPU, with NaN in memory that nothing has written to."""

import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch

INTERPRET = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}

# Triton asks once for all, when it is imported. Other tests and the processes that they start do without.
with pytest.MonkeyPatch.context() as patch:
    for name, value in INTERPRET.items():
        patch.setenv(name, value)


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in INTERPRET.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """What a kernel does not write stays NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _quiet_arithmetic() -> Iterator[None]:
    """The interpreter computes by NumPy, which warns where a GPU gives infinity or NaN."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
        yield


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run here."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
