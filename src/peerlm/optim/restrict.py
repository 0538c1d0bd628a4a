"""Gradients of chosen entries alone: between the backward pass and the optimizer's step."""

from collections.abc import Callable

import torch
from torch import Tensor

from peerlm.ops.padded_rows import pad, padded_ids
from peerlm.optim.sparse_gradients import sum_rows

_HELD = "_peerlm_held"
"""Attribute of a parameter: how many `hold` it now."""


def hold(parameter: Tensor, keep: Tensor, *, dim: int = 0) -> Callable[[], None]:
    """Restrict the gradient of `parameter` after each backward pass (`restrict_gradient`), until the result is called.

    An optimizer that updates rows within the backward pass gets no gradient that could be restricted: it asks
    `is_held`.
    """

    def restrict(parameter: Tensor) -> None:
        restrict_gradient(parameter, keep, dim=dim)

    def release() -> None:
        hook.remove()
        setattr(parameter, _HELD, getattr(parameter, _HELD) - 1)

    restrict(parameter)
    hook = parameter.register_post_accumulate_grad_hook(restrict)
    setattr(parameter, _HELD, getattr(parameter, _HELD, 0) + 1)
    return release


def is_held(parameter: Tensor) -> bool:
    """Whether `hold` restricts the gradient of this parameter now."""
    return bool(getattr(parameter, _HELD, 0))


@torch.no_grad()
def restrict_gradient(parameter: Tensor, keep: Tensor, *, dim: int = 0) -> None:
    """Drop the gradient of all entries of `parameter` along `dim` but those to keep, in place.

    A sparse gradient keeps fewer rows, so that RowAdamW does not visit the others; a dense one becomes zero there.
    Momentum moves entries without a gradient on, unless their moments are zero, or the optimizer is
    RowAdamW(lazy=True) and the gradient is sparse; so does weight decay. Does nothing where there is no gradient.

    Args:
        parameter: of any shape.
        keep: bool, one for each entry along `dim`.
        dim: the dimension; 0 of a sparse gradient.

    Raises:
        ValueError: `keep` does not fit, or another dimension of a sparse gradient is asked for.
    """
    if keep.dtype != torch.bool or keep.shape != (parameter.shape[dim],):
        raise ValueError(
            f"keep is {keep.dtype} of shape {tuple(keep.shape)}; give one bool for each of the "
            f"{parameter.shape[dim]} entries along dimension {dim}"
        )
    gradient = parameter.grad
    if gradient is None:
        return
    if not gradient.is_sparse:
        shape = [1] * parameter.ndim
        shape[dim] = len(keep)
        gradient.masked_fill_(~keep.view(shape), 0.0)
        return
    if dim:
        raise ValueError(f"a sparse gradient of rows can be restricted along dimension 0, not {dim}")
    values = sum_rows(parameter)
    padded = padded_ids(parameter)
    if padded is None:
        ids = parameter.grad._indices()  # type: ignore[union-attr]
        kept = keep[ids[0]]
        parameter.grad = torch.sparse_coo_tensor(
            ids[:, kept], values[kept], gradient.shape, is_coalesced=True, check_invariants=False
        )
        return
    kept = keep[padded.clamp_min(0)] & (padded >= 0)  # how many these are only the device knows
    values = values.masked_fill(~kept.view(-1, *[1] * (values.ndim - 1)), 0.0)
    parameter.grad = pad(parameter, padded.masked_fill(~kept, -1), values)
