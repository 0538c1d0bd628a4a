"""Sparse gradients of a fixed number of rows: those that a device alone knows to occur, then padding.

Shape suffixes: S rows and padding, each of shape X.
"""

import torch
from torch import Tensor

_PADDED = "_peerlm_padded_rows"
"""Attribute of a parameter: the indices that `pad` gave its gradient, and what it was given."""


def pad(parameter: Tensor, ids_S: Tensor, values_SX: Tensor) -> Tensor:
    """A gradient of a parameter (N, *X), sparse COO with indices (1, S) and values (S, *X), not coalesced.

    It is right for readers who know of no padding: that repeats a row which occurs, and is zero. Nothing waits for the
    device. `padded_ids` tells which is which.

    Args:
        parameter: remembers the row numbers, until its next gradient.
        ids_S: int64, distinct; -1 is padding, anywhere.
        values_SX: zero at padding.
    """
    indices_S = ids_S if len(ids_S) == 0 else torch.where(ids_S < 0, ids_S.amax().clamp_min(0), ids_S)
    indices = indices_S[None]
    setattr(parameter, _PADDED, (indices, ids_S))
    return torch.sparse_coo_tensor(indices, values_SX, parameter.shape, is_coalesced=False, check_invariants=False)


def padded_ids(parameter: Tensor) -> Tensor | None:
    """The row numbers, -1 at padding, of the gradient that a parameter has; None where `pad` has not made it."""
    known: tuple[Tensor, Tensor] | None = getattr(parameter, _PADDED, None)
    gradient = parameter.grad
    if known is None or gradient is None or not gradient.is_sparse:
        return None
    indices, ids_S = known
    found = gradient._indices()
    # Autograd stores a gradient as another tensor of the same indices, whose memory is not given back before.
    return ids_S if (found.data_ptr(), found.shape) == (indices.data_ptr(), indices.shape) else None
