"""Sparse gradients of rows: made coalesced cheaply, and their norm, which torch's clipping lacks.

`torch.nn.utils.clip_grad_norm_`, and with it transformers.Trainer (which calls it even where nothing is to be
clipped, to log the norm), knows `linalg_vector_norm` for dense gradients alone.
"""

import torch
from torch import Tensor

_library = torch.library.Library("aten", "IMPL")


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
    return torch.linalg.vector_norm(coalesced(x).values(), ord, dtype=dtype)


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
