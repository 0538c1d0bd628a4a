"""The public operations: which backend computes them, and what is asked of their arguments.

A backend is one file in this folder and one entry in `_MODULES`. An explicit choice works or explains itself: it never
falls back. "auto" takes the native kernels where they were built and support the arguments, and otherwise what PyTorch
has. Autocast stops here: the dtypes are those of the arguments, because scores rounded to bfloat16 would choose other
experts.
"""

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor

from peerlm.ops import bag, cpu, cpu_rows, native, onednn, reference
from peerlm.ops.pairing import PAIRINGS
from peerlm.ops.row_updates import RowState

_MODULES: dict[str, ModuleType] = {"reference": reference, "bag": bag, "cpu": cpu}

BACKENDS = ("auto", *_MODULES)


def available_backends() -> dict[str, str]:
    """Each backend by name, and in one phrase what it is; "auto" says what it stands for."""
    return {
        "auto": "reference and bag"
        if native.unavailable()
        else "cpu for tensors on a CPU, otherwise reference and bag",
        "reference": "the definition in eager PyTorch, any device, twice differentiable",
        "bag": "expert mixing by PyTorch's embedding bags, any device, gathered rows are never materialised",
        "cpu": native.description(),
    }


def check_backend(backend: str) -> None:
    """Raise a ValueError where `backend` is not the name of a backend, or is one that cannot run on this machine."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; choose one of {', '.join(BACKENDS)}")
    if backend == "cpu" and (reason := native.unavailable()):
        raise ValueError(f"backend is 'cpu', but {reason}; choose 'auto' or install peerlm again")


def check_activation(activation: str) -> None:
    """Raise a ValueError where `activation` is not the name of an activation."""
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; choose one of {', '.join(reference.ACTIVATIONS)}")


def check_pairing(pairing: str) -> None:
    """Raise a ValueError where `pairing` is not the name of a pairing."""
    if pairing not in PAIRINGS:
        raise ValueError(f"pairing is {pairing!r}; choose one of {', '.join(PAIRINGS)}")


def use_huge_pages(tensor: Tensor) -> bool:
    """Ask the system to back a large CPU tensor by huge pages; returns whether it agreed."""
    return native.use_huge_pages(tensor)


def move_to_start(source: Tensor, target: Tensor) -> bool:
    """Move a tensor to the start of a larger one, giving its memory back meanwhile; returns whether that was possible.

    Afterwards nothing may read `source`.
    """
    return native.move_to_start(source, target)


def row_kernels(table: RowState) -> ModuleType | None:
    """The native module with `optim.row_step`'s functions for this table; None where there is none."""
    return cpu_rows if cpu_rows.supports(table) else None


def fit_rules(
    a_SK: Tensor, c_SK: Tensor, *, tolerance: float, spreads: Tensor, num_probes: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """What `optim.catch_up.fit_rules` defines, natively; None where the kernels were not built. All float64."""
    return None if native.unavailable() else cpu_rows.fit_rules(a_SK, c_SK, tolerance, spreads, num_probes)


def _choose(backend: str, fallback: str, *inputs: Tensor, rows: Tensor | None = None) -> ModuleType:
    """The module that computes with these inputs; `fallback` is what "auto" takes where the native one cannot."""
    check_backend(backend)
    if backend in ("auto", "cpu"):
        reason = cpu.unsupported(*inputs, rows=rows)
        if reason and backend == "cpu":
            raise ValueError(f"backend is 'cpu', but {reason}; choose 'auto', or convert the tensors")
        backend = fallback if reason else "cpu"
    return _MODULES[backend]


def _without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    device_type = tensor.device.type
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def linear(x: Tensor, weight: Tensor, *, backend: str = "auto") -> Tensor:
    """The product x W^T of x (T, D) and weight (O, D), for queries; autocast applies, as to any linear layer."""
    check_backend(backend)
    return onednn.linear(x, weight) if backend in ("auto", "cpu") else torch.nn.functional.linear(x, weight)


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
        backend: a name in `BACKENDS`; "bag" has no retrieval of its own and takes the reference.

    Returns:
        weights (T, H, k) in float32 at least, and expert ids (T, H, k) int64 in 0 .. n * n - 1, best first.
        Experts are ordered by the exact sum of their half scores, equal sums by ascending id. The reference scores
        in the dtype of its arguments, float32 at least, the native kernels choose by float64 scores.
    """
    check_pairing(pairing)
    module = _choose("reference" if backend == "bag" else backend, "reference", query, sub_keys)
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
        weights, expert_ids: (T, P); ids int64 in 0 .. N - 1, repetitions count each time.
        rows: (N, 2, D), the experts' u and v, or (N, 3, D) with g for gated experts; a float dtype, or int8.
        scales: (N, 2 or 3) float32, what each vector of int8 rows is multiplied by; otherwise None.
        activation: "gelu", "gelu_tanh", "relu", "silu", "identity" or "one_plus".
        backend: a name in `BACKENDS`.
        row_gradients: give the gradient of `rows` as a sparse tensor of the rows that occur; not with "bag".

    Returns:
        (T, D), in the dtype of x.
    """
    module = _choose(backend, "reference" if row_gradients or scales is not None else "bag", x, weights, rows=rows)
    if module is bag and (row_gradients or scales is not None):
        raise ValueError("backend 'bag' has no sparse row gradients and takes no int8 rows; choose 'auto'")
    options = {"row_gradients": True} if row_gradients else {}
    with _without_autocast(x):
        return module.mix_experts(x, weights, expert_ids, rows, scales, activation, **options)


def mix_values(
    weights: Tensor, value_ids: Tensor, values: Tensor, *, backend: str = "auto", row_gradients: bool = False
) -> Tensor:
    """Sum each token's retrieved values: weights, value_ids (T, P), values (N, D) -> (T, D)."""
    module = _choose(backend, "reference" if row_gradients else "bag", weights, rows=values)
    if module is bag and row_gradients:
        raise ValueError("backend 'bag' has no sparse row gradients; choose 'auto'")
    options = {"row_gradients": True} if row_gradients else {}
    with _without_autocast(weights):
        return module.mix_values(weights, value_ids, values, **options)


def dot_values(
    x: Tensor, value_ids: Tensor, values: Tensor, *, backend: str = "auto", row_gradients: bool = False
) -> Tensor:
    """Inner products of each token with its rows: x (T, D), value_ids (T, P), values (N, D) -> (T, P).

    In float32 at least, with "bag" in the dtype of the values. With `mix_values` it makes experts that write another
    width than they read: mix_values(weights * act(dot_values(x, ids, down)), ids, up).
    """
    module = _choose(backend, "reference" if row_gradients else "bag", x, rows=values)
    if module is bag and row_gradients:
        raise ValueError("backend 'bag' has no sparse row gradients; choose 'auto'")
    options = {"row_gradients": True} if row_gradients else {}
    with _without_autocast(x):
        return module.dot_values(x, value_ids, values, **options)
