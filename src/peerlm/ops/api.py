"""The public operations: which backend computes them, and what is asked of their arguments.

A backend is a module (`backend.py` says with which functions) and one entry in `_BACKENDS`. An explicit choice works or
explains itself: it never falls back. "auto" takes the first backend that can. Autocast stops here: the dtypes are those
of the arguments, because scores rounded to bfloat16 would choose other experts.
"""

import importlib
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from peerlm.ops.attention_step import AddedNorm, AttentionStep, Layer, RMSNorm, Step, Through
from peerlm.ops.backend import Backend
from peerlm.ops.compiled import constant_in_graphs, never_compiled
from peerlm.ops.functions import ACTIVATIONS, WEIGHTINGS
from peerlm.ops.pairing import PAIRINGS
from peerlm.ops.row_formats import SCALED_DTYPES, scales_shape, width
from peerlm.ops.row_updates import RowState
from peerlm.ops.whole_layer import DenseLayer, WholeLayer

_BACKENDS: dict[str, tuple[str, ...]] = {
    "cpu": ("peerlm.ops.cpu.kernels",),
    "triton": ("peerlm.ops.triton.kernels",),
    "bag": ("peerlm.ops.bag", "peerlm.ops.reference"),
    "reference": ("peerlm.ops.reference", "peerlm.ops.reference_operators"),
}
"""Each backend's modules, in the order in which "auto" asks them: an operation is that of the first module that has it.
They are imported when first asked for."""

BACKENDS = ("auto", *_BACKENDS)

_BY_ROW = (
    "the gradient of a table that RowAdamW trains is given by row, which a compiled graph cannot do: "
    "compile without fullgraph=True"
)

_loaded: dict[str, Backend] = {}


def _backend(name: str) -> Backend:
    """The first module of a backend, which speaks for all."""
    path = _BACKENDS[name][0]
    found = _loaded.get(path)
    return _import(path) if found is None else found


def _module(path: str) -> Backend:
    found = _loaded.get(path)
    return _import(path) if found is None else found


@constant_in_graphs  # torch.compile does not trace imports
def _import(path: str) -> Backend:
    _loaded[path] = cast(Backend, importlib.import_module(path))
    return _loaded[path]


def _is_automatic(backend: Backend) -> bool:
    """Whether "auto" may take a backend."""
    return getattr(backend, "automatic", True)


def load_backends() -> None:
    """Import every backend, so that `torch.ops.peerlm` is complete, as `torch.export.load` needs it."""
    for paths in _BACKENDS.values():
        for path in paths:
            _module(path)


def available_backends() -> dict[str, str]:
    """Each backend by name, and in one phrase what it is; "auto" says what it stands for."""
    able = [name for name in _BACKENDS if _is_automatic(_backend(name)) and not _backend(name).unavailable()]
    auto = f"the first that can compute with the tensors, of {', '.join(able)}"
    return {"auto": auto} | {name: _backend(name).description() for name in _BACKENDS}


def check_backend(backend: str) -> None:
    """Raise a ValueError where `backend` is not the name of a backend, or is one that cannot run on this machine."""
    if backend == "auto":
        return
    if backend not in _BACKENDS:
        raise ValueError(f"backend is {backend!r}; choose one of {', '.join(('auto', *_BACKENDS))}")
    if reason := _backend(backend).unavailable():
        raise ValueError(f"backend is {backend!r}, but {reason}; or choose 'auto'")


def check_activation(activation: str) -> None:
    """Raise a ValueError where `activation` is not the name of an activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; choose one of {', '.join(ACTIVATIONS)}")


def check_weighting(weighting: str) -> None:
    """Raise a ValueError where `weighting` is not the name of a weighting."""
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting is {weighting!r}; choose one of {', '.join(WEIGHTINGS)}")


def check_pairing(pairing: str) -> None:
    """Raise a ValueError where `pairing` is not the name of a pairing."""
    if pairing not in PAIRINGS:
        raise ValueError(f"pairing is {pairing!r}; choose one of {', '.join(PAIRINGS)}")


def _offer(function: str, *arguments: object, backend: str = "auto") -> Any:
    """What the first backend gives that has this function and gives something; None where none does."""
    for name in _BACKENDS if backend == "auto" else (backend,):
        offered = getattr(_backend(name), function, None)
        if offered is not None and (found := offered(*arguments)):
            return found
    return None


def use_huge_pages(tensor: Tensor) -> bool:
    """Ask the system to back a large CPU tensor by huge pages; returns whether it agreed."""
    return bool(_offer("use_huge_pages", tensor))


def move_to_start(source: Tensor, target: Tensor) -> bool:
    """Move a tensor to the start of a larger one, giving its memory back meanwhile; returns whether that was possible.

    Afterwards nothing may read `source`.
    """
    return bool(_offer("move_to_start", source, target))


def updates_rows_on(device: torch.device) -> bool:
    """Whether some backend has kernels for a step of `optim.RowAdamW` on this device."""
    return bool(_offer("updates_rows_on", device))


def row_kernels(table: RowState) -> ModuleType | None:
    """The module that has kernels for `optim.row_step`'s functions on this table; None where there is none."""
    return cast("ModuleType | None", _offer("row_kernels", table))


def sum_by_row(ids_E: Tensor, values_EX: Tensor, num_rows: int) -> tuple[Tensor, Tensor] | None:
    """Sums of the values of equal ids, without waiting for the device; None where there are no kernels for that.

    Returns ids (S,) int64, distinct, then -1, with S = min(E, num_rows); and sums (S, *X), zeros where the id is -1.
    """
    return cast("tuple[Tensor, Tensor] | None", _offer("sum_by_row", ids_E, values_EX, num_rows))


def fit_rules(
    a_SK: Tensor, c_SK: Tensor, *, tolerance: float, spreads: Tensor, num_probes: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """What `optim.catch_up.fit_rules` defines, natively; None where the kernels were not built. All float64."""
    return cast("tuple[Tensor, Tensor, Tensor] | None", _offer("fit_rules", a_SK, c_SK, tolerance, spreads, num_probes))


def _choose(
    op: str,
    backend: str,
    *inputs: Tensor,
    ids: Tensor | None = None,
    rows: Tensor | None = None,
    scales: Tensor | None = None,
    row_gradients: bool = False,
) -> Backend:
    """The module that computes `op` with these arguments: the first that can, or the one that is asked for.

    Raises ValueError where it cannot.
    """
    check_backend(backend)
    reason, of_device = "", ""
    for name in _BACKENDS if backend == "auto" else (backend,):
        first = _backend(name)
        if backend == "auto" and not _is_automatic(first):
            continue
        reason = first.unavailable() or first.unsupported(
            op, *inputs, ids=ids, rows=rows, scales=scales, row_gradients=row_gradients
        )
        if not reason:
            if of_device and not torch.compiler.is_compiling():
                _say_once(f"{of_device}; backend {name!r} computes in its place, more slowly")
            return first if hasattr(first, op) else next(m for m in map(_module, _BACKENDS[name][1:]) if hasattr(m, op))
        if getattr(first, "device_type", "") == inputs[0].device.type:
            of_device = f"backend {name!r} has kernels for this device, but {reason}"
    if backend == "auto":
        raise ValueError(f"no backend computes this: {of_device or reason}; convert the tensors")
    raise ValueError(f"backend is {backend!r}, but {reason}; choose 'auto', or convert the tensors")


@cache
def _say_once(what: str) -> None:
    warnings.warn(what, stacklevel=4)


def _refuse_shapes(**tensors: Tensor) -> None:
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    raise ValueError(f"shapes do not fit each other: {shapes}; T tokens, width D and entries P must be the same in all")


def _check_float(tensor: Tensor, name: str) -> None:
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        raise ValueError(f"{name} has dtype {tensor.dtype}; it must have a float dtype of 16 bits or more")


def _without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    device_type = tensor.device.type
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def linear(x: Tensor, weight: Tensor, *, backend: str = "auto") -> Tensor:
    """The product x W^T of x (T, D) and weight (O, D), for queries; autocast applies, as to any linear layer."""
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"shapes do not fit each other: x {tuple(x.shape)}, weight {tuple(weight.shape)}; "
            "they must be (T, D) and (O, D)"
        )
    return _choose("linear", backend, x, weight).linear(x, weight)


def retrieve(
    query: Tensor,
    sub_keys: Tensor,
    k: int,
    *,
    weighting: str = "softmax",
    pairing: str = "row-major",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Retrieve every head's k best experts by product keys; equal to a search over all n * n experts.

    Args:
        query: (T, H, key_dim), any float dtype.
        sub_keys: (2, H or 1, n, key_dim / 2).
        k: experts per head, 1 <= k <= n.
        weighting: "softmax" over each head's k scores, "sigmoid", "relu", or "none" (the raw score).
        pairing: which id the expert of sub-keys i and j has: "row-major", i * n + j, or "shells", j * j + i where
            i < j, otherwise i * i + i + j, so that more sub-keys only append ids.
        backend: a name in `BACKENDS`.

    Returns:
        weights (T, H, k) in float32 at least, and expert ids (T, H, k) int64 in 0 .. n * n - 1, best first.
        Experts are ordered by the exact sum of their half scores, equal sums by ascending id. Half scores are
        computed in the dtype of the arguments, float32 at least, by native kernels in float64.

    Raises:
        ValueError: an unknown name, or a backend that cannot compute with these tensors.
    """
    check_pairing(pairing)
    check_weighting(weighting)
    _check_float(query, "query")
    _check_float(sub_keys, "sub_keys")
    halves, sets, n, half_dim = sub_keys.shape
    if halves != 2 or query.ndim != 3 or sets not in (1, query.shape[1]) or query.shape[2] != 2 * half_dim:
        raise ValueError(
            f"shapes do not fit each other: query {tuple(query.shape)}, sub_keys {tuple(sub_keys.shape)}; "
            "they must be (T, H, 2 C) and (2, H or 1, n, C)"
        )
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}; with {n} sub-keys in each half it must be in 1 .. {n}")
    module = _choose("retrieve", backend, query, sub_keys)
    with _without_autocast(query):
        return module.retrieve(query, sub_keys, k, weighting, pairing)


def mix_experts(
    x: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    rows: Tensor,
    scales: Tensor | None = None,
    *,
    activation: str = "gelu",
    backend: str = "auto",
    row_gradients: bool = False,
) -> Tensor:
    """Apply each token's retrieved single-neuron experts and sum them by weight (He 2024, equation 1).

    Args:
        x: (T, D).
        weights, expert_ids: (T, P); ids int64 in 0 .. N - 1, repetitions count each time. Nothing comes of the id -1,
            a hole. Other ids raise an error; on a GPU, which the Triton kernels do not wait for, their tokens get NaN.
        rows: (N, 2, D), the experts' u and v, or (N, 3, D) with g for gated experts; a float dtype of
            16 bits or more, or 8 bits with scales: int8, float8_e4m3fn. Or int4, (N, 2 or 3, D / 2) uint8, see
            `row_formats.INT4`.
        scales: (N, 2 or 3) float32, what each vector of 8-bit rows is multiplied by; (N, 2 or 3, D / 32) for int4;
            otherwise None.
        activation: "gelu", "gelu_tanh", "relu", "silu", "identity" or "one_plus".
        backend: a name in `BACKENDS`.
        row_gradients: give the gradient of `rows` as a sparse tensor of the rows that occur; those with scales have
            none, and are updated in the backward pass. torch.compile leaves the call out of its graph.

    Returns:
        (T, D), in the dtype of x.

    Raises:
        ValueError: an unknown name, or a backend that cannot compute with these arguments.
    """
    check_activation(activation)
    _check_float(x, "x")
    _check_float(weights, "weights")
    if (rows.dtype in SCALED_DTYPES) != (scales is not None):
        given = "no scales" if scales is None else "scales"
        need = " and ".join(str(dtype).removeprefix("torch.") for dtype in SCALED_DTYPES)
        raise ValueError(
            f"rows have dtype {rows.dtype} and {given} are given; {need} rows need scales, others have none"
        )
    if scales is None:
        _check_float(rows, "rows")
    elif rows.requires_grad:
        raise ValueError(f"rows have dtype {rows.dtype} and require a gradient; rows with scales have none")
    elif scales.shape != (rows.shape[0], *scales_shape((*rows.shape[1:-1], width(rows)), rows.dtype)):
        _refuse_shapes(rows=rows, scales=scales)
    if rows.ndim != 3 or rows.shape[1] not in (2, 3):
        raise ValueError(f"rows have shape {tuple(rows.shape)}; it must be (N, 2, D), or (N, 3, D) for gated experts")
    if weights.shape != expert_ids.shape or x.shape != (weights.shape[0], width(rows)):
        _refuse_shapes(x=x, weights=weights, expert_ids=expert_ids, rows=rows)
    module = _choose(
        "mix_experts", backend, x, weights, ids=expert_ids, rows=rows, scales=scales, row_gradients=row_gradients
    )
    with _without_autocast(x):
        if row_gradients:
            return never_compiled(
                _BY_ROW, _with_row_gradients, module, "mix_experts", x, weights, expert_ids, rows, scales, activation
            )
        return module.mix_experts(x, weights, expert_ids, rows, scales, activation)


def whole_layer(layer: WholeLayer | DenseLayer, *, backend: str = "auto") -> Callable[[Tensor], Tensor | None] | None:
    """What makes of a few tokens x (..., D) the layer's output, without gradients, in one call; None where none does.

    Of experts, it is what `linear`, the norm, `retrieve` and `mix_experts` make together, but for rounding. It gives
    None for tokens that it does not take, too many among them, and reads the layer's tensors where they are now.
    """
    return cast("Callable[[Tensor], Tensor | None] | None", _offer("whole_layer", layer, backend=backend))


def attention_step(step: AttentionStep) -> Step | None:
    """What passes one new token of each of a few sequences through a block's attention in one call; or None.

    Without gradients. It reads the weights where they are now. A sequence's bits do not depend on those beside it.
    """
    return cast("Step | None", _offer("attention_step", step))


def added_norm(norm: RMSNorm) -> AddedNorm | None:
    """A sum and its norm in one call, as between the steps of `attention_step`; None where none does this."""
    return cast("AddedNorm | None", _offer("added_norm", norm))


def through_blocks(steps: Sequence[Step], layers: Sequence[Layer], last: AddedNorm) -> Through | None:
    """All blocks in one call: their steps and layers (`whole_layer`) in turn, and a norm; None where none does this."""
    return cast("Through | None", _offer("through_blocks", steps, layers, last))


def mix_values(
    weights: Tensor, value_ids: Tensor, values: Tensor, *, backend: str = "auto", row_gradients: bool = False
) -> Tensor:
    """Sum each token's retrieved values: weights, value_ids (T, P), values (N, D) -> (T, D); -1 is a hole."""
    _check_float(weights, "weights")
    _check_float(values, "values")
    if weights.ndim != 2 or weights.shape != value_ids.shape or values.ndim != 2:
        _refuse_shapes(weights=weights, value_ids=value_ids, values=values)
    module = _choose("mix_values", backend, weights, ids=value_ids, rows=values, row_gradients=row_gradients)
    with _without_autocast(weights):
        if row_gradients:
            return never_compiled(_BY_ROW, _with_row_gradients, module, "mix_values", weights, value_ids, values)
        return module.mix_values(weights, value_ids, values)


def dot_values(
    x: Tensor, value_ids: Tensor, values: Tensor, *, backend: str = "auto", row_gradients: bool = False
) -> Tensor:
    """Inner products of each token with its rows: x (T, D), value_ids (T, P), values (N, D) -> (T, P).

    In float32 at least, or in the dtype of the values; 0 where the id is -1, a hole. With `mix_values` it makes experts
    that write another width than they read: mix_values(weights * act(dot_values(x, ids, down)), ids, up).
    """
    _check_float(x, "x")
    _check_float(values, "values")
    if value_ids.ndim != 2 or values.ndim != 2 or x.shape != (value_ids.shape[0], values.shape[1]):
        _refuse_shapes(x=x, value_ids=value_ids, values=values)
    module = _choose("dot_values", backend, x, ids=value_ids, rows=values, row_gradients=row_gradients)
    with _without_autocast(x):
        if row_gradients:
            return never_compiled(_BY_ROW, _with_row_gradients, module, "dot_values", x, value_ids, values)
        return module.dot_values(x, value_ids, values)


def _with_row_gradients(module: Backend, op: str, *arguments: object) -> Tensor:
    """An operation whose row gradients go to an optimizer, which may update rows in the backward pass."""
    return cast(Tensor, getattr(module, op)(*arguments, row_gradients=True))
