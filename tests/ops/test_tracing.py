"""Every backend under torch.compile, torch.export, fake and meta tensors: as in eager PyTorch, in one graph."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from peerlm import PEER, ProductKeyMemory
from peerlm.ops import api
from peerlm.ops.cpu import native
from peerlm.ops.pairing import PAIRINGS
from peerlm.ops.scoring import top_k
from peerlm.testing import assert_within_budget, definition, float64

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(bool(native._reason), reason="not built") if name == "cpu" else ())
    for name in api.BACKENDS
]
LAYERS: dict[str, Callable[[str], torch.nn.Module]] = {
    "peer": lambda backend: PEER(16, query_norm="layer", experts_per_head=3, num_experts=64, **sizes(backend)),
    "gated, shells": lambda backend: PEER(
        16, query_norm="batch", gated=True, pairing="shells", experts_per_head=3, num_experts=64, **sizes(backend)
    ),
    "memory": lambda backend: ProductKeyMemory(16, values_per_head=3, num_values=64, **sizes(backend)),
}

pytestmark = pytest.mark.filterwarnings("default")  # torch.compile warns of what it does


def sizes(backend: str) -> dict[str, Any]:
    return {"heads": 2, "key_dim": 8, "backend": backend}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(False)
    yield
    torch._dynamo.reset()


def value_and_gradients(module: torch.nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = run(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["gated, shells", "memory"])
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_compiled_in_one_graph_a_layer_has_the_same_bits(backend: str, layer: str) -> None:
    """Without the compiler's own kernels, whose rounding is another."""
    module, x = LAYERS[layer](backend).eval(), torch.randn(12, 16)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected = value_and_gradients(module, module, x)
    for found, right in zip(value_and_gradients(module, compiled, x), expected, strict=True):
        assert torch.equal(found, right)


@pytest.mark.slow
def test_compiled_in_one_graph_by_inductor() -> None:
    """As `test_compiled_layer` of the native kernels."""
    module, x = LAYERS["peer"]("reference").eval(), torch.randn(12, 16)
    compiled = torch.compile(module, fullgraph=True)
    plain = value_and_gradients(module, module, x)
    with float64():
        twin = definition(module)
        exact = value_and_gradients(twin, twin, x.double())
    assert_within_budget(value_and_gradients(module, compiled, x), plain, exact)


@pytest.mark.parametrize(("backend", "strict"), [("cpu", False), ("bag", False), ("reference", False), ("auto", True)])
def test_an_exported_layer_takes_any_number_of_tokens(backend: str, strict: bool) -> None:
    if backend == "cpu" and native._reason:
        pytest.skip(native._reason)
    module = LAYERS["gated, shells"](backend).eval()
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(module, (torch.randn(7, 16),), dynamic_shapes=({0: tokens},), strict=strict).module()
    for x in (torch.randn(7, 16), torch.randn(31, 16)):
        assert torch.equal(program(x), module(x))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_and_dtypes_of_fake_tensors(backend: str, layer: str) -> None:
    module = LAYERS[layer](backend)
    expected = value_and_gradients(module, module, torch.randn(6, 16))
    with FakeTensorMode():
        fake = LAYERS[layer](backend)
        found = value_and_gradients(fake, fake, torch.randn(6, 16))
    assert [(f.shape, f.dtype) for f in found] == [(e.shape, e.dtype) for e in expected]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("backend", ["auto", "bag", "reference"])
def test_shapes_and_dtypes_of_meta_tensors(backend: str, layer: str) -> None:
    module = LAYERS[layer](backend)
    expected = value_and_gradients(module, module, torch.randn(6, 16))
    with torch.device("meta"):
        meta = LAYERS[layer](backend)
        found = value_and_gradients(meta, meta, torch.randn(6, 16))
    assert [(f.shape, f.dtype, f.device.type) for f in found] == [(e.shape, e.dtype, "meta") for e in expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_ties_are_decided_alike_in_a_graph_and_outside(pairing: str, dtype: torch.dtype) -> None:
    query, sub_keys = (torch.randint(-1, 2, shape).to(dtype) for shape in ((40, 2, 4), (2, 1, 12, 2)))
    query[3] = -0.0
    options = {"weighting": "none", "pairing": pairing, "backend": "reference"}
    expected = api.retrieve(query, sub_keys, 6, **options)
    compiled = torch.compile(api.retrieve, fullgraph=True, backend="aot_eager")
    for found, right in zip(compiled(query, sub_keys, 6, **options), expected, strict=True):
        assert torch.equal(found, right)


AWKWARD = [0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, 1e-45, -1e-45, 3e38, -3e38, 1 + 2**-23]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_order_without_a_look_at_the_values_is_that_with_one(dtype: torch.dtype) -> None:
    scores = torch.tensor(AWKWARD, dtype=dtype)[torch.randint(len(AWKWARD), (200, 17))]
    for k in (1, 5, 17):
        expected = top_k(scores, k, look_for_ties=True)
        assert all(torch.equal(a, b) for a, b in zip(top_k(scores, k, look_for_ties=False), expected, strict=True))
