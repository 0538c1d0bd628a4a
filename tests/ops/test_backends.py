"""Which backend computes: explicit choices never fall back, and what is in use is said."""

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from peerlm import PEER, ProductKeyMemory
from peerlm.cli import main
from peerlm.ops import api
from peerlm.ops.cpu import native
from peerlm.testing import MixInputs, mix_inputs

from ..fresh import python
from ..processes import run
from ..targets import targets

NEEDS_KERNELS = pytest.mark.skipif(bool(native._reason), reason=native._reason)


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there was no compiler."""
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "_reason", "the native kernels were not built")


def single_inputs() -> MixInputs:
    return mix_inputs(3, 4, 6, 5).to(torch.float32)


def test_kernels_are_built_where_there_is_a_compiler() -> None:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler on this machine")
    assert native._reason == ""


@NEEDS_KERNELS
@pytest.mark.parametrize(
    ("dtype", "device", "message"),
    [
        (torch.float64, "cpu", "backend is 'cpu', but a tensor has dtype torch.float64, .*; choose 'auto', or convert"),
        (torch.float32, "meta", "backend is 'cpu', but a tensor is on meta, .*; choose 'auto', or convert the tensors"),
    ],
)
def test_explicit_choice_never_falls_back(dtype: torch.dtype, device: str, message: str) -> None:
    def tensor(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=dtype, device=device)

    ids = torch.zeros(3, 4, dtype=torch.int64, device=device)
    for call in (
        lambda backend: api.retrieve(tensor(3, 2, 4), tensor(2, 1, 5, 2), 3, backend=backend)[0],
        lambda backend: api.mix_experts(tensor(3, 6), tensor(3, 4), ids, tensor(5, 2, 6), backend=backend),
        lambda backend: api.mix_values(tensor(3, 4), ids, tensor(5, 6), backend=backend),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            call("cpu")
        assert "\n" not in str(raised.value)
    assert call("auto").device.type == device


@NEEDS_KERNELS
def test_rows_of_another_dtype_are_refused_by_name_and_taken_by_auto() -> None:
    inputs = single_inputs()
    arguments = (inputs.x, inputs.weights, inputs.ids, inputs.rows.half())
    with pytest.raises(ValueError, match=r"rows have dtype torch.float16, .* take float32, bfloat16, int8"):
        api.mix_experts(*arguments, backend="cpu")
    expected = api.mix_experts(*arguments, backend="bag")
    assert torch.equal(api.mix_experts(*arguments), expected)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"row_gradients": True}, "have no sparse row gradients"),
        ({"scales": torch.ones(5, 2)}, "take no rows of 8 bits"),
    ],
    ids=["sparse", "int8"],
)
def test_bag_refuses_what_it_has_not(options: dict[str, object], reason: str) -> None:
    x, weights, ids, rows = single_inputs().arguments()
    rows = rows.detach().char() if "scales" in options else rows
    with pytest.raises(ValueError, match=f"backend is 'bag', but embedding bags {reason}; choose 'auto'"):
        api.mix_experts(x, weights, ids, rows, backend="bag", **options)


@pytest.mark.usefixtures("without_kernels")
def test_without_kernels_auto_runs_on_pytorch() -> None:
    layer = PEER(16, num_experts=16, heads=2, experts_per_head=3, key_dim=4)
    memory = ProductKeyMemory(16, num_values=16, heads=2, values_per_head=3, key_dim=4)
    x = torch.randn(5, 16)
    for module in (layer, memory):
        module(x).sum().backward()
        assert all(parameter.grad is not None for parameter in module.parameters())
    inputs = single_inputs()
    expected = api.mix_experts(*inputs.arguments(), backend="bag")
    assert torch.equal(api.mix_experts(*inputs.arguments()), expected)
    sparse = torch.autograd.grad(api.mix_experts(*inputs.arguments(), row_gradients=True).sum(), inputs.rows)[0]
    assert sparse.is_sparse


@pytest.mark.usefixtures("without_kernels")
def test_without_kernels_an_explicit_choice_is_refused() -> None:
    message = "backend is 'cpu', but the native kernels were not built; or choose 'auto'"
    with pytest.raises(ValueError, match=message):
        api.mix_experts(*single_inputs().arguments(), backend="cpu")
    with pytest.raises(ValueError, match=message):
        PEER(16, num_experts=16, heads=2, experts_per_head=3, key_dim=4, backend="cpu")


@pytest.mark.usefixtures("without_kernels")
def test_without_kernels_it_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    available = api.available_backends()
    assert available["cpu"] == "not available: the native kernels were not built"
    assert available["auto"] == "the first that can compute with the tensors, of bag, reference"
    assert not api.use_huge_pages(torch.empty(2**22))
    with pytest.raises(SystemExit) as ended:
        main(["info", "--json=-"])
    assert ended.value.code in (None, 0)
    assert json.loads(capsys.readouterr().out)["backends"] == available


def test_a_missing_extension_is_found_at_import(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["peerlm.ops.cpu._native"] = None
from peerlm.ops import api
print(api.available_backends()["cpu"])
"""
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("not available: the native kernels were not built when peerlm was installed")
    assert "C++17 compiler" in done.stdout


@NEEDS_KERNELS
def test_what_is_in_use_is_said() -> None:
    said = api.available_backends()
    assert said["auto"] == "the first that can compute with the tensors, of cpu, bag, reference"
    assert f"native kernels for {native.module.target()}, of" in said["cpu"]
    assert said["cpu"].endswith(f"{torch.get_num_threads()} threads")


@NEEDS_KERNELS
def test_huge_pages_are_asked_for_large_tables_alone() -> None:
    assert not api.use_huge_pages(torch.empty(1000))
    assert not api.use_huge_pages(torch.empty(2**22, device="meta"))
    assert api.use_huge_pages(torch.empty(2**22)) == Path("/sys/kernel/mm/transparent_hugepage").exists()


@NEEDS_KERNELS
def test_target_that_the_machine_does_not_run(tmp_path: Path) -> None:
    message = f"PEERLM_SIMD is 'mmx'; this machine runs {native.module.runnable_targets()}"
    code, said = run(tmp_path / "said", {"PEERLM_SIMD": "mmx"}, make_a_layer)
    assert code == 1
    assert said.rstrip().endswith(f"UserError: {message}")
    assert run(tmp_path / "said", {"PEERLM_SIMD": "mmx"}, main, ["info"]) == (2, f"error: {message}\n")


def make_a_layer() -> None:
    PEER(16, num_experts=16, heads=2, experts_per_head=3, key_dim=4)


@NEEDS_KERNELS
def test_named_target_is_the_one_in_use(tmp_path: Path) -> None:
    assert run(tmp_path / "said", {"PEERLM_SIMD": "portable"}, print_target) == (0, "portable\n")


def print_target() -> None:
    print(native.module.target())  # noqa: T201


def test_auto_says_once_why_a_device_has_to_do_without_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    bag = api._backend("bag")
    own = SimpleNamespace(device_type="cpu", unavailable=lambda: "", unsupported=lambda op, *_, **__: "it is Sunday")
    table = {"cpu": own, "bag": bag}
    monkeypatch.setattr(api, "_BACKENDS", dict.fromkeys(table, ("",)))
    monkeypatch.setattr(api, "_backend", table.__getitem__)
    api._say_once.cache_clear()
    values, ids = torch.ones(2, 4), torch.zeros(2, 3, dtype=torch.int64)
    message = (
        "backend 'cpu' has kernels for this device, but it is Sunday; backend 'bag' computes in its place, more slowly"
    )
    with pytest.warns(UserWarning, match=message):
        api.mix_values(torch.ones(2, 3), ids, values)
    api.mix_values(torch.ones(2, 3), ids, values)


@pytest.mark.slow
@NEEDS_KERNELS
@pytest.mark.skipif("PEERLM_SIMD" in os.environ, reason="these tests run under one target already")
@pytest.mark.parametrize("number", range(1, len(targets())))
def test_numbers_of_other_targets(number: int, tmp_path: Path) -> None:
    """The native kernels' tests for each SIMD target but the best, which all other tests run by.

    All targets are compiled from one source, so that each runs a quarter of a test's cases, not the same as the next
    target. Targets with VNNI score otherwise than those without, and are the same in all else.

    `make test-targets` runs every case of every numerical test under every target.
    """
    target = targets()[number]
    tests = Path(__file__).parent.parent
    files = ["ops/test_cpu_retrieval.py"]
    if not target.endswith("vnni"):
        files += ["ops/test_cpu_mixing.py", "optim/test_row_kernels.py"]
    arguments = ["-q", "-p", "no:cacheprovider", "-m", "numerical and not slow", f"--share={1 + number % 4}/4"]
    arguments += [str(tests / file) for file in files]
    # The server has imported plugins that pytest could no longer rewrite.
    environment = {"PEERLM_SIMD": target, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    code, said = run(tmp_path / "said", environment, run_tests, target, f"--basetemp={tmp_path / 'tests'}", *arguments)
    assert code == 0, said
    assert " passed" in said.splitlines()[-1]


def run_tests(target: str, *arguments: str) -> None:
    assert native.module.target() == target
    sys.exit(pytest.main(list(arguments)))


def test_where_no_backend_is_left_auto_says_why_and_names_no_other_choice() -> None:
    x, weights = torch.ones(1, 4, device="meta"), torch.ones(1, 2, device="meta")
    rows = torch.ones(3, 2, 4, dtype=torch.int8, device="meta")
    ids, scales = torch.ones(1, 2, dtype=torch.int64, device="meta"), torch.ones(3, 2, device="meta")
    message = "^no backend computes this: the definition does not train rows of 8 bits; convert the tensors$"
    with pytest.raises(ValueError, match=message):
        api.mix_experts(x, weights, ids, rows, scales, row_gradients=True)
