"""Sparse gradients of rows: each row once, as cheaply as can be, and their norm, which torch's clipping lacks.

`torch.nn.utils.clip_grad_norm_`, and with it transformers.Trainer (which calls it even where nothing is to be
clipped, to log the norm), knows `linalg_vector_norm` for dense gradients alone.
"""

from functools import cache

import torch
from torch import Tensor

from peerlm.ops import api
from peerlm.ops.padded_rows import pad, padded_ids
from peerlm.ops.row_keeping import names_of
from peerlm.ops.tensors import read_at_once

_library = torch.library.Library("aten", "IMPL")


@cache
def teach_torch_sparse_norms() -> None:
    """Let `torch.linalg.vector_norm` take sparse COO tensors of this process, where torch itself does not yet."""
    tiny = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1), (1,), check_invariants=True)
    try:
        torch.linalg.vector_norm(tiny)
    except NotImplementedError:
        for backend in ("SparseCPU", "SparseCUDA"):
            _library.impl("linalg_vector_norm", _vector_norm, backend)


def _vector_norm(
    x: Tensor,
    ord: float = 2.0,
    dim: list[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Of all entries; entries that are not stored are zeros, and count for no norm with ord > 0."""
    if dim is not None or keepdim or ord <= 0:
        raise NotImplementedError("of a sparse tensor only the norm of all entries is known, for ord > 0")
    summed = None if x.is_coalesced() else _sum_on_device(x)
    values = coalesced(x).values() if summed is None else summed[1]
    return torch.linalg.vector_norm(values, ord, dtype=dtype)


def sum_rows(parameter: Tensor) -> Tensor:
    """Let a parameter's sparse gradient have each row once; returns the values (S, *X), for changes in place.

    Where there are kernels that do not wait for the device, it is padded then (`padded_rows.pad`), by values of zero;
    elsewhere it is coalesced.
    """
    gradient = parameter.grad
    assert gradient is not None
    if padded_ids(parameter) is None and not gradient.is_coalesced():
        summed = _sum_on_device(gradient)
        parameter.grad = coalesced(gradient) if summed is None else pad(parameter, *summed)
    return parameter.grad._values()  # type: ignore[union-attr]  # not values(), which refuses changes in place


def in_order(parameter: Tensor, values: Tensor) -> Tensor:
    """What has the norm of the values that `sum_rows` gave, in an order that depends on the table's rows alone.

    Where rows have places, and so lie in another order in each run, that is the norm of each row in the rows' order.
    """
    names, gradient = names_of(parameter), parameter.grad
    if names is None or gradient is None or not gradient.is_sparse:
        return values
    ids = padded_ids(parameter)
    ids = gradient._indices()[0] if ids is None else ids
    order = torch.argsort(torch.where(ids < 0, -1, names[ids]), stable=True)
    norms = torch.linalg.vector_norm(values.flatten(1), dim=1, dtype=torch.promote_types(values.dtype, torch.float32))
    return norms[order]


def shorten(parameter: Tensor) -> None:
    """Sum the rows of a gradient that has more of them than the parameter, where the device need not be waited for.

    So the gradient of many micro-batches takes no more memory than that of one.
    """
    gradient = parameter.grad
    if gradient is None or not gradient.is_sparse or read_at_once(gradient.device):
        return
    if gradient._nnz() > len(parameter):
        sum_rows(parameter)


def _sum_on_device(gradient: Tensor) -> tuple[Tensor, Tensor] | None:
    ids = gradient._indices()
    return api.sum_by_row(ids[0], gradient._values(), len(gradient)) if len(ids) == 1 else None


def coalesced(gradient: Tensor) -> Tensor:
    """A sparse gradient with distinct ascending rows.

    Autograd forgets that a gradient is coalesced when it stores it; where row numbers ascend nothing is copied.
    """
    if gradient.is_coalesced():
        return gradient
    ids = gradient._indices()
    if len(ids) != 1 or not bool((ids[0, 1:] > ids[0, :-1]).all()):
        return gradient.coalesce()
    return torch.sparse_coo_tensor(ids, gradient._values(), gradient.shape, is_coalesced=True, check_invariants=False)
