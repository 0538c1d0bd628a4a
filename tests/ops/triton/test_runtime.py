"""Where Triton's kernels run, and what they refuse."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from peerlm.ops import api
from peerlm.ops.operators import Operators
from peerlm.ops.triton import runtime


def test_the_kernels_are_taken_by_name_alone_where_they_are_interpreted() -> None:
    assert getattr(api._backend("triton"), "automatic") == (not runtime.INTERPRETED)  # noqa: B009


def test_an_explicit_choice_refuses_what_the_kernels_cannot_compute(device: torch.device) -> None:
    values, ids = torch.ones(2, 4, device=device), torch.zeros(2, 3, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"backend is 'triton', but .*float64.*choose 'auto'"):
        api.mix_values(torch.ones(2, 3, dtype=torch.float64, device=device), ids, values, backend="triton")
    with pytest.raises(ValueError, match=r"backend is 'triton', but a tensor is on meta"):
        api.mix_values(torch.ones(2, 3, device="meta"), ids, values, backend="triton")


def test_kernels_are_launched_on_the_gpu_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: dict[str, Callable[..., Tensor]] = {}
    asked: list[Tensor] = []

    def device_of(tensor: Tensor) -> AbstractContextManager[None]:
        asked.append(tensor)
        return nullcontext()

    operators = Operators("peerlm_on_its_gpu")
    library = SimpleNamespace(impl=lambda name, kernel, key: registered.update({name: kernel}))
    monkeypatch.setattr(operators, "_library", library)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    operators.implement({"row_gradients": lambda x, grad_y: grad_y}, "CUDA")
    grad_y = torch.ones(1)
    assert registered["row_gradients"](None, grad_y) is grad_y
    assert len(asked) == 1
    assert asked[0] is grad_y


@pytest.mark.parametrize(
    ("missing", "version", "reason"),
    [
        ("triton", "", "Triton is not installed: pip install 'peerlm[gpu]'"),
        ("numpy", "3.7.1", "NumPy is not installed, which Triton's interpreter computes with: pip install numpy"),
        ("", "3.5.1", "Triton is 3.5.1, and the kernels need 3.6 or newer: pip install 'triton>=3.6'"),
        ("", "2.3.0", "Triton is 2.3.0, and the kernels need 3.6 or newer: pip install 'triton>=3.6'"),
        ("", "3.10.0+git1234", ""),
        ("", "4.0rc1", ""),
    ],
)
def test_a_package_that_is_missing_or_too_old_is_named(
    monkeypatch: pytest.MonkeyPatch, missing: str, version: str, reason: str
) -> None:
    monkeypatch.setattr(runtime, "INTERPRETED", True)
    monkeypatch.setattr(runtime, "_version", lambda: version)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else object())
    found = runtime._why_not()
    assert found == reason
    if reason:
        monkeypatch.setattr(runtime, "_REASON", found)
        assert api.available_backends()["triton"] == f"not available: {reason}"
        with pytest.raises(ValueError, match="or choose 'auto'") as refused:
            api.check_backend("triton")
        assert str(refused.value) == f"backend is 'triton', but {reason}; or choose 'auto'"


def test_a_triton_that_cannot_be_imported_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise ImportError("libcuda.so.1 is not there")

    monkeypatch.setattr(runtime, "_version", broken)
    monkeypatch.setattr(runtime, "INTERPRETED", True)
    assert runtime._why_not() == "Triton cannot be imported (libcuda.so.1 is not there)"


def test_a_gpu_that_is_too_old_is_refused_and_auto_leaves_it_alone(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    kernels: Any = api._backend("triton")
    values, ids = torch.ones(2, 4, device=device), torch.zeros(2, 3, dtype=torch.int64, device=device)
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    for capability, version, reason in (
        ((7, 5), None, "Tesla T4 has compute capability 7.5, and the Triton kernels need 8.0 or newer"),
        ((8, 0), None, ""),
        ((7, 5), "6.4", ""),  # ROCm counts otherwise
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        monkeypatch.setattr(torch.version, "hip", version)
        assert runtime.too_old() == reason
        assert kernels.unsupported("mix_values", torch.ones(2, 3, device=device), ids=ids, rows=values) == reason
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ValueError, match=r"backend is 'triton', but Tesla T4 has compute capability 7\.5"):
        api.mix_values(torch.ones(2, 3, device=device), ids, values, backend="triton")


@pytest.mark.parametrize("dim", [33, 7, 1])
def test_rows_whose_bytes_are_no_multiple_of_16_are_computed_as_all_others(dim: int, device: torch.device) -> None:
    """They are read in narrower pieces: "auto" takes the kernels for them too."""
    kernels: Any = api._backend("triton")
    rows = torch.randn(5, 2, dim, device=device).bfloat16()
    x, weights = torch.randn(3, dim, device=device), torch.rand(3, 4, device=device)
    ids = torch.randint(5, (3, 4), device=device)
    assert kernels.unsupported("mix_experts", x, weights, ids=ids, rows=rows) == ""
    found = api.mix_experts(x, weights, ids, rows, backend="triton")
    expected = api.mix_experts(x.double(), weights.double(), ids, rows.double(), backend="reference")
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    beyond = torch.cat([rows.flatten()[:1], rows.flatten()])[1:].view_as(rows)  # 2 bytes after a 16-byte boundary
    assert beyond.data_ptr() % 16
    assert torch.equal(api.mix_experts(x, weights, ids, beyond, backend="triton"), found)
