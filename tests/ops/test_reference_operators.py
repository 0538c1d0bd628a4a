"""The operators in eager PyTorch: the definition's values and gradients, and those of the native kernels."""

from pathlib import Path
from typing import Any

import pytest
import torch

from peerlm import PEER
from peerlm.ops import api, reference
from peerlm.ops.cpu import native
from peerlm.ops.functions import ACTIVATIONS, WEIGHTINGS
from peerlm.ops.pairing import PAIRINGS
from peerlm.ops.reference_operators import KERNELS
from peerlm.ops.row_formats import quantise
from peerlm.testing import assert_within_budget, definition, mix_inputs

from ..fresh import python

NEEDS_KERNELS = pytest.mark.skipif(bool(native._reason), reason=native._reason)


@pytest.mark.parametrize("key_heads", [1, 3])
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_gradients_of_retrieval(weighting: str, pairing: str, key_heads: int) -> None:
    query = torch.randn(5, 3, 8, dtype=torch.float64, requires_grad=True)
    sub_keys = torch.randn(2, key_heads, 6, 4, dtype=torch.float64, requires_grad=True)
    weights, ids = reference.retrieve(query, sub_keys, 4, weighting, pairing)
    grad = torch.randn_like(weights)
    saved = [tensor.detach() for tensor in (weights, ids, query, sub_keys)]
    found = KERNELS["retrieve_backward"](grad, *saved, weighting, pairing)
    torch.testing.assert_close(found, torch.autograd.grad(weights, (query, sub_keys), grad))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_mixing(activation: str, gated: bool) -> None:
    inputs = mix_inputs(5, 6, 4, 7, gated=gated)
    x, weights, ids, rows = (tensor.detach() for tensor in inputs.arguments())
    y = reference.mix_experts(*inputs.arguments(), None, activation)
    grad_y = torch.randn_like(y)
    expected = torch.autograd.grad(y, inputs.leaves(), grad_y)
    found, hidden = KERNELS["mix_experts"](x, weights, ids, rows, None, activation, False)
    torch.testing.assert_close(found, y.detach())
    grad_x, grad_weights, coefficients = KERNELS["mix_experts_backward"](
        grad_y, weights, ids, hidden, rows, None, activation
    )
    torch.testing.assert_close((grad_x, grad_weights), expected[:2])
    of_rows = x, grad_y, ids, coefficients, len(rows)
    torch.testing.assert_close(KERNELS["row_gradients"](*of_rows), expected[2])
    occur, by_row = KERNELS["gradients_by_row"](*of_rows)
    assert torch.equal(occur, ids.unique())
    torch.testing.assert_close(by_row, expected[2][occur])


def test_gradients_of_values() -> None:
    inputs = mix_inputs(5, 6, 4, 7)
    weights, ids, values = inputs.weights, inputs.ids, inputs.rows[:, 0].detach().requires_grad_()
    y = reference.mix_values(weights, ids, values)
    grad_y = torch.randn_like(y)
    expected = torch.autograd.grad(y, (weights, values), grad_y)
    plain = weights.detach(), ids, values.detach()
    torch.testing.assert_close(KERNELS["mix_values"](*plain, False), y.detach())
    torch.testing.assert_close(KERNELS["mix_values_backward"](grad_y, *plain), expected[0])
    torch.testing.assert_close(KERNELS["dot_values"](grad_y, *plain[1:], False), expected[0])
    found = KERNELS["row_gradients"](None, grad_y, ids, plain[0][..., None], len(values))
    torch.testing.assert_close(found[:, 0], expected[1])


def native_cases() -> dict[str, tuple[Any, ...]]:
    """Arguments of every operator, float32, as the kernels take them."""
    torch.manual_seed(0)
    rows, grad_y = torch.randn(9, 3, 6), torch.randn(5, 6)
    int8, scales = quantise(rows)
    x, weights, ids = torch.randn(5, 6), torch.randn(5, 4), torch.randint(9, (5, 4))
    query, sub_keys, chosen = torch.randn(5, 2, 6), torch.randn(2, 2, 7, 3), torch.randint(49, (5, 2, 4))
    hidden, coefficients = torch.randn(5, 4, 2), torch.randn(5, 4, 3)
    return {
        "linear": (x, torch.randn(3, 6)),
        "retrieve": (query, sub_keys, 4, "softmax"),
        "retrieve_backward": (torch.randn(5, 2, 4), torch.rand(5, 2, 4), chosen, query, sub_keys, "none"),
        "mix_experts": (x, weights, ids, int8, scales, "gelu", False),
        "mix_experts_backward": (grad_y, weights, ids, hidden, rows.bfloat16(), None, "silu"),
        "mix_values": (weights, ids, rows[:, 0].bfloat16().contiguous(), False),
        "mix_values_backward": (grad_y, weights, ids, rows[:, 0].contiguous()),
        "dot_values": (x, ids, rows[:, 0].contiguous(), False),
        "row_gradients": (x, grad_y, ids, coefficients, 9),
        "gradients_by_row": (None, grad_y, ids, coefficients[..., :1].contiguous(), 9),
    }


@NEEDS_KERNELS
@pytest.mark.parametrize("name", KERNELS)
def test_native_kernels_agree_with_them(name: str) -> None:
    api.load_backends()
    arguments = native_cases()[name]
    wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    found, plain, exact = (
        result if isinstance(result, tuple) else (result,)
        for result in (getattr(torch.ops.peerlm, name)(*arguments), KERNELS[name](*arguments), KERNELS[name](*wide))
    )
    for values in zip(found, plain, exact, strict=True):
        if values[0].is_floating_point():
            assert_within_budget(*values)
        else:
            assert torch.equal(*values[:2])


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kernels", [True, False], ids=["native", "eager"])
def test_an_exported_layer_runs_where_no_layer_was_made(kernels: bool, tmp_path: Path) -> None:
    torch.use_deterministic_algorithms(False)
    peer, x = PEER(8, num_experts=16, heads=2, experts_per_head=3, key_dim=4).eval(), torch.randn(5, 8)
    torch.export.save(torch.export.export(peer, (x,)), tmp_path / "peer.pt2")
    torch.save(x, tmp_path / "x.pt")
    code = f"""
import sys
import torch
from peerlm.ops import api
if not {kernels}:
    sys.modules["peerlm.ops.cpu._native"] = None
api.load_backends()
x = torch.load({str(tmp_path / "x.pt")!r})
program = torch.export.load({str(tmp_path / "peer.pt2")!r}).module()
torch.save(program(x).detach(), {str(tmp_path / "y.pt")!r})
print(torch._C._dispatch_has_kernel_for_dispatch_key("peerlm::retrieve", "CPU"))
"""
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{kernels and not native._reason}\n"
    assert_within_budget(torch.load(tmp_path / "y.pt"), peer(x), definition(peer)(x.double()))
