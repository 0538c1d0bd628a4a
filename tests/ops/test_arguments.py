"""What each backend makes of arguments that are no plain float32 tensors: computed as in the definition, or refused."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map_only

from peerlm import PEER
from peerlm.ops import api
from peerlm.ops.cpu import native
from peerlm.ops.row_formats import quantise
from peerlm.testing import assert_within_budget, definition, float64

Arguments = dict[str, Tensor]
Operation = Callable[[Arguments, str], Tensor]

OPERATIONS: dict[str, Operation] = {
    "linear": lambda a, backend: api.linear(a["x"], a["weight"], backend=backend),
    "retrieve": lambda a, backend: api.retrieve(
        a["query"], a["sub_keys"], 3, weighting="sigmoid", pairing="shells", backend=backend
    )[0],
    "mix_experts": lambda a, backend: api.mix_experts(a["x"], a["weights"], a["ids"], a["rows"], backend=backend),
    "mix_values": lambda a, backend: api.mix_values(a["weights"], a["ids"], a["values"], backend=backend),
    "dot_values": lambda a, backend: api.dot_values(a["x"], a["ids"], a["values"], backend=backend),
}
USES = {
    "linear": ("x", "weight"),
    "retrieve": ("query", "sub_keys"),
    "mix_experts": ("x", "weights", "ids", "rows"),
    "mix_values": ("weights", "ids", "values"),
    "dot_values": ("x", "ids", "values"),
}
FLOAT8 = torch.float8_e4m3fn
READS_ROWS = ("mix_experts", "mix_values", "dot_values")
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(bool(native._reason), reason="not built") if name == "cpu" else ())
    for name in api.BACKENDS
]
OWN = {
    "cpu": {*USES} - {"linear"},
    "triton": {*USES} - {"linear"},
    "bag": {*USES} - {"linear", "retrieve"},
}
"""What a backend computes by kernels or autograd functions, not by PyTorch's own operations."""


class Wrapper(Tensor):
    """Keeps its values in another tensor, as quantised weights do; every operation sees that one."""

    @staticmethod
    def __new__(cls, values: Tensor) -> "Wrapper":
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device=values.device)

    def __init__(self, values: Tensor):
        self.values_inside = values

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Wrapper, lambda each: each.values_inside, (args, kwargs or {}))
        result = func(*args, **kwargs)
        return Wrapper(result) if func is torch.ops.aten.detach.default else result


class Named(Tensor):
    """Plain memory with a name of its own."""


def arguments(tokens: int = 12) -> Arguments:
    generator = torch.Generator().manual_seed(tokens)
    shapes = {
        "x": (tokens, 8),
        "weight": (3, 8),
        "query": (tokens, 2, 8),
        "sub_keys": (2, 1, 9, 4),
        "weights": (tokens, 4),
        "rows": (16, 2, 8),
        "values": (16, 8),
    }
    drawn = {name: torch.randn(shape, generator=generator).bfloat16().float() for name, shape in shapes.items()}
    return drawn | {"ids": torch.randint(16, (tokens, 4), generator=generator)}


def strided(tensor: Tensor) -> Tensor:
    """The same values, neither contiguous nor at the start of its memory."""
    wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1] + 1, dtype=tensor.dtype)
    wide[..., 1::2] = tensor
    return wide[..., 1::2]


def floats(given: Arguments, change: Callable[[Tensor], Tensor]) -> Arguments:
    return {name: change(value) if value.is_floating_point() else value for name, value in given.items()}


def assert_as_defined(name: str, found: Tensor, given: Arguments) -> None:
    """The value errs no more than that of the reference in the same precision."""
    plain, exact = (OPERATIONS[name](floats(given, change), "reference") for change in (copied, widened))
    if found.dtype == exact.dtype:  # no wider float judges float64
        torch.testing.assert_close(found, exact)
    else:
        assert_within_budget(found, plain.to(found.dtype), exact)


def copied(tensor: Tensor) -> Tensor:
    """Contiguous, plain and without a graph, in inference mode too."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def widened(tensor: Tensor) -> Tensor:
    """The same in float64."""
    return torch.empty(tensor.shape, dtype=torch.float64).copy_(tensor.detach())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPERATIONS)
class TestComputes:
    """Every operation by every backend."""

    def test_tensors_that_are_not_contiguous(self, name: str, backend: str) -> None:
        given = {key: strided(value) for key, value in arguments().items()}
        assert not any(given[key].is_contiguous() for key in USES[name])
        assert_as_defined(name, OPERATIONS[name](given, backend), given)

    def test_gradients_of_tensors_that_are_not_contiguous(self, name: str, backend: str) -> None:
        leaves = floats(arguments(), lambda t: strided(t).requires_grad_())
        plain = floats(leaves, lambda t: copied(t).requires_grad_())
        wide = floats(leaves, lambda t: widened(t).requires_grad_())

        def gradients(given: Arguments, backend: str) -> tuple[Tensor, ...]:
            value = OPERATIONS[name](given, backend).square().sum()
            return torch.autograd.grad(value, [given[key] for key in USES[name] if key != "ids"])

        assert_within_budget(gradients(leaves, backend), gradients(plain, "reference"), gradients(wide, "reference"))

    def test_no_tokens(self, name: str, backend: str) -> None:
        leaves = floats(arguments(0), Tensor.requires_grad_)
        y = OPERATIONS[name](leaves, backend)
        assert_as_defined(name, y, leaves)
        assert len(y) == 0
        names = [key for key in USES[name] if key != "ids"]
        for gradient in torch.autograd.grad(y.sum(), [leaves[key] for key in names]):
            assert not gradient.any()

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_without_a_graph(self, name: str, backend: str, context: type[AbstractContextManager[None]]) -> None:
        with context():
            given = floats(arguments(), nn.Parameter)
            y = OPERATIONS[name](given, backend)
            assert_as_defined(name, y, given)
        assert not y.requires_grad

    def test_memory_of_a_class_with_another_name(self, name: str, backend: str) -> None:
        given = floats(arguments(), lambda tensor: tensor.as_subclass(Named))
        y = OPERATIONS[name](given, backend).as_subclass(Tensor)
        assert torch.equal(y, OPERATIONS[name](arguments(), backend))

    def test_autocast(self, name: str, backend: str) -> None:
        plain = OPERATIONS[name](arguments(), backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = OPERATIONS[name](arguments(), backend)
        if name == "linear":
            assert y.dtype == torch.bfloat16
        else:
            assert torch.equal(y, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_dtypes(name: str, backend: str, dtype: torch.dtype) -> None:
    given = floats(arguments(), lambda tensor: tensor.to(dtype))
    refused = {
        "cpu": {torch.float16: set(READS_ROWS), torch.float64: OWN["cpu"]},
        "triton": {torch.float64: OWN["triton"]},
    }
    if name in refused.get(backend, {}).get(dtype, ()):
        kernels = {"cpu": "the native kernels", "triton": "the Triton kernels"}[backend]
        with pytest.raises(ValueError, match=f"backend is '{backend}', but .* ha(s|ve) dtype {dtype}, and {kernels}"):
            OPERATIONS[name](given, backend)
        return
    y = OPERATIONS[name](given, backend)
    assert_as_defined(name, y, given)
    wide = name == "retrieve" or (name == "dot_values" and y.dtype != dtype)
    assert y.dtype == (torch.promote_types(dtype, torch.float32) if wide else dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "which"), [(name, which) for name in OPERATIONS for which in USES[name]])
def test_a_subclass_with_operations_of_its_own_is_passed_on_or_refused(name: str, which: str, backend: str) -> None:
    given = arguments()
    given[which] = Wrapper(given[which])
    if name in OWN.get(backend, ()):
        with pytest.raises(ValueError, match=f"backend is '{backend}', but a tensor is a Wrapper, .* choose 'auto'"):
            OPERATIONS[name](given, backend)
        return
    assert_as_defined(name, OPERATIONS[name](given, backend), arguments())


@pytest.mark.parametrize("tokens", [1, 8, 9, 33])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_whose_query_map_was_quantised_from_outside(backend: str, tokens: int) -> None:
    layer = PEER(16, num_experts=64, heads=2, experts_per_head=3, key_dim=8, query_norm="none", backend=backend)
    x = torch.randn(tokens, 16)
    plain = definition(layer, None)(x)
    with float64():
        exact = definition(layer)(x.double())
    weight = layer.product_keys.query_proj.weight
    layer.product_keys.query_proj.weight = nn.Parameter(Wrapper(weight.detach()), requires_grad=False)
    assert_within_budget(layer(x), plain, exact)


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).square().sum())(x),
    "vmap": lambda f, x: torch.vmap(f)(torch.stack([x, 2 * x])),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "vmap of grad": lambda f, x: torch.vmap(torch.func.grad(lambda x: f(x).square().sum()))(torch.stack([x, 2 * x])),
    "dual numbers": lambda f, x: dual(f, x),
}


def dual(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
        assert tangent is not None
        return tangent


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own forward mode takes it
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_transforms_are_computed_by_pytorchs_operations_or_refused(name: str, transform: str, backend: str) -> None:
    given, which = arguments(), USES[name][0]

    def run(backend: str, given: Arguments) -> Any:
        return TRANSFORMS[transform](lambda x: OPERATIONS[name](given | {which: x}, backend), given[which])

    if name in OWN.get(backend, ()):
        reason = "has a tangent" if transform == "dual numbers" else "is within a transform of torch.func"
        with pytest.raises(ValueError, match=f"backend is '{backend}', but a tensor {reason}.*; choose 'auto'"):
            run(backend, given)
        return
    assert_within_budget(run(backend, given), run("reference", given), run("reference", floats(given, Tensor.double)))


def test_vmap_over_ids_alone_is_seen() -> None:
    given = arguments()
    ids = torch.stack([given["ids"], given["ids"].flip(0)])
    y = torch.vmap(lambda ids: OPERATIONS["mix_experts"](given | {"ids": ids}, "auto"))(ids)
    for each, right in zip(y, ids, strict=True):
        assert_as_defined("mix_experts", each, given | {"ids": right})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("linear", {"weight": torch.ones(3, 7)}, r"x \(12, 8\), weight \(3, 7\); they must be \(T, D\) and"),
        ("retrieve", {"query": torch.ones(12, 2, 6)}, r"query \(12, 2, 6\), sub_keys \(2, 1, 9, 4\); they must be"),
        (
            "retrieve",
            {"sub_keys": torch.ones(2, 1, 2, 4)},
            r"k is 3; with 2 sub-keys in each half it must be in 1 .. 2",
        ),
        ("retrieve", {"query": torch.ones(12, 2, 8).long()}, "query has dtype torch.int64; it must have a float dtype"),
        ("mix_experts", {"x": torch.ones(5, 8)}, r"x \(5, 8\), weights \(12, 4\), expert_ids \(12, 4\), rows \(16, 2"),
        ("mix_experts", {"weights": torch.ones(12, 3)}, r"weights \(12, 3\), expert_ids \(12, 4\)"),
        ("mix_experts", {"rows": torch.ones(16, 4, 8)}, r"rows have shape \(16, 4, 8\); it must be \(N, 2, D\)"),
        ("mix_experts", {"rows": torch.ones(16, 2, 8).char()}, "rows have dtype torch.int8 and no scales are given"),
        ("mix_experts", {"rows": torch.ones(16, 2, 8).to(FLOAT8)}, "rows have dtype torch.float8_e4m3fn and no scales"),
        ("mix_experts", {"rows": torch.ones(16, 2, 8).long()}, "rows has dtype torch.int64; it must have a float"),
        ("mix_experts", {"x": torch.ones(12, 8).long()}, "x has dtype torch.int64; it must have a float dtype"),
        ("mix_values", {"values": torch.ones(16, 8).char()}, "values has dtype torch.int8; it must have a float dtype"),
        ("mix_values", {"weights": torch.ones(12, 3)}, r"weights \(12, 3\), value_ids \(12, 4\)"),
        ("mix_values", {"values": torch.ones(16, 8).to(FLOAT8)}, "values has dtype torch.float8_e4m3fn; .* of 16 bits"),
        ("dot_values", {"x": torch.ones(12, 8).to(FLOAT8)}, "x has dtype torch.float8_e4m3fn; it must have a float"),
        ("dot_values", {"x": torch.ones(12, 7)}, r"x \(12, 7\), value_ids \(12, 4\), values \(16, 8\)"),
    ],
)
def test_what_does_not_fit_is_refused_alike(name: str, changes: Arguments, message: str, backend: str) -> None:
    with pytest.raises(ValueError, match=message):
        OPERATIONS[name](arguments() | changes, backend)


def test_scales_that_do_not_fit_are_refused() -> None:
    given = arguments()
    rows, scales = quantise(given["rows"])
    for wrong_rows, wrong, message in (
        (given["rows"], scales, "rows have dtype torch.float32 and scales are given"),
        (rows, scales[:5], r"rows \(16, 2, 8\), scales \(5, 2\)"),
        (rows.to(FLOAT8).requires_grad_(), scales, "float8_e4m3fn and require a gradient; rows with scales have none"),
    ):
        with pytest.raises(ValueError, match=message):
            api.mix_experts(given["x"], given["weights"], given["ids"], wrong_rows, wrong)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_in_float8(backend: str) -> None:
    given = arguments()
    scales = torch.rand(16, 2)
    rows = (given["rows"] / scales[..., None]).to(FLOAT8)

    def mix(backend: str) -> Tensor:
        return api.mix_experts(given["x"], given["weights"], given["ids"], rows, scales, backend=backend)

    if backend == "bag":
        with pytest.raises(ValueError, match=r"backend is 'bag', but .*; choose 'auto'"):
            mix(backend)
        return
    wide = given | {"rows": rows.float() * scales[..., None]}
    torch.testing.assert_close(mix(backend), OPERATIONS["mix_experts"](wide, "reference"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [-17, 16])  # -1 is a hole
@pytest.mark.parametrize("name", READS_ROWS)
def test_ids_that_are_of_no_row_are_refused_or_give_nan(name: str, shift: int, backend: str) -> None:
    """A GPU cannot refuse without being asked, which takes longer than the kernels."""
    given = arguments()
    if backend == "triton":
        assert OPERATIONS[name](given | {"ids": given["ids"] + shift}, backend).isnan().all()
        return
    with pytest.raises((IndexError, RuntimeError)):
        OPERATIONS[name](given | {"ids": given["ids"] + shift}, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unknown_names_are_refused_alike(backend: str) -> None:
    given = arguments()
    with pytest.raises(ValueError, match="activation is 'tanh'; choose one of gelu, "):
        api.mix_experts(given["x"], given["weights"], given["ids"], given["rows"], activation="tanh", backend=backend)
    with pytest.raises(ValueError, match="weighting is 'tanh'; choose one of softmax, "):
        api.retrieve(given["query"], given["sub_keys"], 3, weighting="tanh", backend=backend)


@pytest.mark.parametrize("where", [torch.float64, torch.bfloat16, "meta"])
def test_a_layer_that_was_moved_runs_on_what_can(where: torch.dtype | str) -> None:
    layer = PEER(16, num_experts=64, heads=2, experts_per_head=3, key_dim=8).to(where)
    weight = layer.experts.rows
    y = layer(torch.zeros(5, 16, dtype=weight.dtype, device=weight.device))
    assert (y.dtype, y.device, y.shape) == (weight.dtype, weight.device, (5, 16))
