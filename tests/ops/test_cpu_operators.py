"""Native kernels as PyTorch operators: schemas, compilation, export, checkpointing, threads."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peerlm import PEER, PeerConfig, PeerForCausalLM, ProductKeyMemory
from peerlm.ops import api
from peerlm.ops.cpu import native
from peerlm.ops.functions import WEIGHTINGS
from peerlm.ops.operators import PEERLM
from peerlm.ops.row_formats import quantise
from peerlm.testing import assert_within_budget, definition, float64, mix_inputs

pytestmark = pytest.mark.skipif(bool(native._reason), reason=native._reason)

api.load_backends()
operators = torch.ops.peerlm


@pytest.fixture
def any_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def layer(**settings: Any) -> PEER:
    settings = {"num_experts": 64, "heads": 2, "experts_per_head": 3, "key_dim": 8, "backend": "cpu"} | settings
    return PEER(16, **settings)


def outputs_and_gradients(module: torch.nn.Module, run: Callable[..., Tensor], x: Tensor) -> list[Tensor]:
    """y, and the gradients of x and of every parameter that the sum of y * y has."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad(set_to_none=True)
    y = run(x)
    y.square().sum().backward()
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return [y.detach(), x.grad, *gradients]


def retrieve_arguments(weighting: str, key_heads: int) -> tuple[Any, ...]:
    return leaf(5, 2, 6), leaf(2, key_heads, 7, 3), 4, weighting


def mix_arguments(parts: int, row_format: str) -> tuple[Any, ...]:
    rows, scales = torch.randn(9, parts, 6), None
    if row_format == "int8":
        rows, scales = quantise(rows)
    else:
        rows = rows.to(getattr(torch, row_format)).requires_grad_()
    return leaf(5, 6), leaf(5, 4), torch.randint(9, (5, 4)), rows, scales, "gelu"


@pytest.mark.parametrize("key_heads", [1, 2])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("pairing", [(), ("shells",)])
def test_opcheck_of_retrieval(pairing: tuple[str, ...], weighting: str, key_heads: int) -> None:
    query, sub_keys, k, _ = arguments = retrieve_arguments(weighting, key_heads)
    torch.library.opcheck(operators.retrieve.default, (*arguments, *pairing))
    weights, ids = operators.retrieve(query.detach(), sub_keys.detach(), k, weighting, *pairing)
    backward = torch.randn(5, 2, 4), weights, ids, query.detach(), sub_keys.detach(), weighting, *pairing
    torch.library.opcheck(operators.retrieve_backward.default, backward)


@pytest.mark.parametrize("row_format", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("parts", [2, 3])
def test_opcheck_of_mixing(parts: int, row_format: str) -> None:
    arguments = mix_arguments(parts, row_format)
    torch.library.opcheck(operators.mix_experts.default, (*arguments, False))
    x, weights, ids, rows, scales, activation = (a.detach() if isinstance(a, Tensor) else a for a in arguments)
    _, hidden = operators.mix_experts(x, weights, ids, rows, scales, activation, False)
    backward = torch.randn(5, 6), weights, ids, hidden, rows, scales, activation
    torch.library.opcheck(operators.mix_experts_backward.default, backward)
    _, _, coefficients = operators.mix_experts_backward(*backward)
    for operator in (operators.row_gradients, operators.gradients_by_row):
        torch.library.opcheck(operator.default, (x, torch.randn(5, 6), ids, coefficients, 9))


@pytest.mark.parametrize("row_format", ["float32", "bfloat16"])
def test_opcheck_of_values(row_format: str) -> None:
    values = torch.randn(9, 6).to(getattr(torch, row_format)).requires_grad_()
    weights, ids = leaf(5, 4), torch.randint(9, (5, 4))
    torch.library.opcheck(operators.mix_values.default, (weights, ids, values, False))
    backward = torch.randn(5, 6), weights.detach(), ids, values.detach()
    torch.library.opcheck(operators.mix_values_backward.default, backward)
    torch.library.opcheck(operators.row_gradients.default, (None, torch.randn(5, 6), ids, torch.randn(5, 4, 1), 9))


@pytest.mark.parametrize("row_format", ["float32", "bfloat16"])
def test_opcheck_of_inner_products(row_format: str) -> None:
    values = torch.randn(9, 6).to(getattr(torch, row_format)).requires_grad_()
    torch.library.opcheck(operators.dot_values.default, (leaf(5, 6), torch.randint(9, (5, 4)), values, False))


def test_every_operator_is_checked_here() -> None:
    with_backward = {"retrieve", "mix_experts", "mix_values"}
    checked = with_backward | {f"{name}_backward" for name in with_backward}
    checked |= {"row_gradients", "gradients_by_row", "dot_values"}
    checked |= {"linear"}  # in test_onednn.py
    assert {name.rpartition("::")[2] for name in PEERLM._library._op_defs} == checked


@pytest.mark.parametrize("dim", [16, 21])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.usefixtures("any_threads")
def test_the_same_bits_with_any_number_of_threads(gated: bool, dim: int) -> None:
    torch.manual_seed(3)
    query, sub_keys = torch.randn(60, 2, 20), torch.randn(2, 1, 30, 10)
    inputs = mix_inputs(60, 18, dim, 900, gated=gated).to(torch.float32)
    values = inputs.rows.detach()[:, 0].clone().requires_grad_()
    results = []
    for threads in (1, 1, 2, 3, 3):
        torch.set_num_threads(threads)
        found: list[Tensor] = []
        for weighting in WEIGHTINGS:
            leaves = [tensor.clone().requires_grad_() for tensor in (query, sub_keys)]
            weights, ids = api.retrieve(*leaves, 9, weighting=weighting, backend="cpu")
            found += [weights.detach(), ids, *torch.autograd.grad(weights.square().sum(), leaves)]
        for row_gradients in (False, True):
            y = api.mix_experts(*inputs.arguments(), backend="cpu", row_gradients=row_gradients)
            z = api.mix_values(inputs.weights, inputs.ids, values, backend="cpu", row_gradients=row_gradients)
            gradients = torch.autograd.grad(y.square().sum() + z.square().sum(), [*inputs.leaves(), values])
            found += [y.detach(), z.detach(), *(gradient.to_dense() for gradient in gradients)]
        results.append(found)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_second_derivatives_are_refused() -> None:
    query, sub_keys = leaf(5, 2, 6), leaf(2, 1, 7, 3)
    weights, ids = api.retrieve(query, sub_keys, 4, backend="cpu")
    values = leaf(49, 6)
    mixed = api.mix_values(weights.flatten(1), ids.flatten(1), values, backend="cpu")
    for output, argument in ((weights.square(), query), (weights.square(), sub_keys), (mixed, weights)):
        (gradient,) = torch.autograd.grad(output.sum(), argument, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once only; backend 'reference' is twice"):
            gradient.sum().backward()


@pytest.mark.parametrize("row_gradients", [False, True])
def test_frozen_arguments_get_no_gradient(row_gradients: bool) -> None:
    inputs = mix_inputs(5, 4, 6, 9).to(torch.float32)
    full = torch.autograd.grad(api.mix_experts(*inputs.arguments(), backend="cpu").sum(), inputs.leaves())
    for frozen in range(3):
        leaves = [value.detach().requires_grad_(which != frozen) for which, value in enumerate(inputs.leaves())]
        x, weights, rows = leaves
        api.mix_experts(x, weights, inputs.ids, rows, backend="cpu", row_gradients=row_gradients).sum().backward()
        for which, value in enumerate(leaves):
            assert (value.grad is None) == (which == frozen)
            assert value.grad is None or torch.equal(value.grad.to_dense(), full[which])


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_gradient_checkpointing(gated: bool, use_reentrant: bool) -> None:
    torch.manual_seed(0)
    peer, x = layer(gated=gated, query_norm="layer"), torch.randn(11, 16)
    plain = outputs_and_gradients(peer, peer, x)
    again = outputs_and_gradients(peer, lambda x: checkpoint(peer, x, use_reentrant=use_reentrant), x)
    assert len(plain) == len(again) == 2 + len(list(peer.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_a_layer_used_twice_in_one_graph() -> None:
    peer, x = layer(query_norm="layer"), torch.randn(11, 16)
    actual, plain, exact = (
        outputs_and_gradients(each, lambda x, each=each: each(each(x) + x), x.to(each.experts.rows.dtype))
        for each in (peer, definition(peer, None), definition(peer))
    )
    assert_within_budget(actual, plain, exact)


def test_autocast_changes_neither_experts_nor_arithmetic() -> None:
    peer, x = layer(query_norm="none"), torch.randn(11, 16)
    query, sub_keys = torch.randn(64, 2, 16), torch.randn(2, 1, 32, 8)
    plain = api.retrieve(query, sub_keys, 4, backend="cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = api.retrieve(query, sub_keys, 4, backend="cpu")
        y = peer(x)
    assert all(torch.equal(a, b) for a, b in zip(plain, under_autocast, strict=True))
    assert y.dtype == torch.float32
    y.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in peer.parameters())


@pytest.mark.parametrize("row_format", ["float32", "bfloat16", "int8"])
def test_copies_of_a_layer(row_format: str) -> None:
    peer, x = layer(row_format=row_format).eval(), torch.randn(11, 16)
    for twin in (copy.deepcopy(peer), pickle.loads(pickle.dumps(peer))):
        assert torch.equal(twin(x), peer(x))
        assert twin.experts.rows.data_ptr() != peer.experts.rows.data_ptr()
        assert twin.experts.rows.requires_grad == peer.experts.rows.requires_grad


def assert_compiles(module: torch.nn.Module, x: Tensor, run: Callable[[Any], Tensor]) -> None:
    """Compiled with fullgraph, forward and backward, for two sizes: it errs no more than without may."""

    def results(call: Callable[[Tensor], Any], parameters: torch.nn.Module, part: Tensor) -> dict[str, Tensor]:
        parameters.zero_grad()
        y = run(call(part))
        y.sum().backward()
        return {"": y} | {name: parameter.grad.clone() for name, parameter in parameters.named_parameters()}

    torch._dynamo.reset()
    compiled, judge = torch.compile(module, fullgraph=True, dynamic=True), definition(module)
    for part in (x, x[:3]):
        actual, plain = results(compiled, module, part), results(module, module, part)
        with float64():
            exact = results(judge, judge, part.double() if part.is_floating_point() else part)
        assert_within_budget(actual, plain, exact)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch.compile warns of what it does
@pytest.mark.parametrize(
    "module",
    [
        layer,
        lambda: layer(gated=True, row_format="bfloat16", query_norm="none"),
        lambda: ProductKeyMemory(16, num_values=64, heads=2, values_per_head=3, key_dim=8, backend="cpu").eval(),
    ],
    ids=["peer", "peer, gated, bfloat16", "memory"],
)
def test_compiled_layer(module: Callable[[], torch.nn.Module]) -> None:
    torch.use_deterministic_algorithms(False)
    assert_compiles(module(), torch.randn(12, 16), lambda y: y.square())


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_compiled_language_model() -> None:
    torch.use_deterministic_algorithms(False)
    config = PeerConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffw_layers=["dense", "peer"],
        peer={"num_experts": 64, "heads": 2, "experts_per_head": 3, "key_dim": 8, "backend": "cpu"},
    )
    model = PeerForCausalLM(config).eval()
    assert_compiles(model, torch.randint(64, (6, 10)), lambda output: output.logits.square())


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("row_format", ["float32", "bfloat16", "int8"])
def test_exported_layer(row_format: str) -> None:
    peer, x = layer(row_format=row_format, gated=True).eval(), torch.randn(7, 16)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    exported = torch.export.export(peer, (x,), dynamic_shapes={"x": {0: tokens}}).module()
    for other in (x, torch.randn(31, 16)):
        assert_within_budget(exported(other), peer(other), definition(peer)(other.double()))
    graphs = [module.graph for module in exported.modules() if isinstance(module, torch.fx.GraphModule)]
    names = {str(node.target) for graph in graphs for node in graph.nodes}
    assert {"peerlm.retrieve.default", "peerlm.mix_experts.default"} <= names
