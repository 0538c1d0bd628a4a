"""Tokens to the ranks that hold their rows and results back, where rows are cut and columns are not.

Every rank gets the inputs, weights and ids of all G ranks' tokens, computes with the rows that it holds, and sums what
others computed for its own tokens. Gradients go the same ways back. Shape suffixes: t tokens of a rank, T = G t.

A row's gradient is the sum over all ranks' tokens, each rank's loss a mean over its own: so what enters the computation
with rows backwards is divided by the number of ranks W, and what leaves it for tokens multiplied by W again.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peerlm.parallel.place import Place


class _Gather(torch.autograd.Function):
    """Tensors (t, ...) of every rank, (T, ...)."""

    @staticmethod
    def forward(ctx: Any, place: Place, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.place = place
        return tuple(place.rows.gather(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        place = ctx.place
        return None, *(place.rows.reduce(gradient) * place.world for gradient in gradients)


class _Sum(torch.autograd.Function):
    """The sum over ranks of what each computed for this rank's tokens: (T, ...) -> (t, ...)."""

    @staticmethod
    def forward(ctx: Any, place: Place, partial: Tensor) -> Tensor:
        ctx.place = place
        return place.rows.reduce(partial)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, ctx.place.rows.gather(gradient / ctx.place.world)


def gather_tokens(place: Place, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Float tensors (t, ...) of all ranks' tokens, (T, ...); each rank must call it with as many tokens."""
    return _Gather.apply(place, *tensors)


def sum_for_tokens(place: Place, partial: Tensor) -> Tensor:
    """What all ranks computed for this rank's tokens, summed: (T, ...) -> (t, ...)."""
    return _Sum.apply(place, partial)


def padded(tensor: Tensor, tokens: int, value: float = 0.0) -> Tensor:
    """A tensor (t, ...) for as many tokens as the rank with most has, behind which are ones of this value."""
    missing = tokens - len(tensor)
    return tensor if missing == 0 else F.pad(tensor, [0, 0] * (tensor.ndim - 1) + [0, missing], value=value)
