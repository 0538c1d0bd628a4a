"""Checks of sizes, settings and inputs that all feed-forward layers share."""

import difflib
import inspect
import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from torch import Tensor

_VALUES: dict[Any, tuple[type, str]] = {
    bool: (bool, "true or false"),
    float: (Real, "a number"),
    str: (str, "a word"),
}


def check_sizes(**sizes: int) -> None:
    """Raise a ValueError for the first of these that is no whole number of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise ValueError(f"{name} is {size!r}; it must be a whole number, written without a point")
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")


def check_settings(layer: type, name: str, settings: Mapping[str, Any], *, besides: Iterable[str] = ("dim",)) -> None:
    """Raise a ValueError for the first of these that is no argument of the layer besides those that are set for it.

    Also for one whose value is no switch, number or word where the layer takes one: "no" would count as true. Whole
    numbers are what `check_sizes` sees to. Messages call the layer `name`.
    """
    parameters = inspect.signature(layer).parameters.items()
    known = {each: parameter for each, parameter in parameters if each not in besides}
    for key, value in settings.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"
            raise ValueError(f"{name} has no setting {key!r}; {hint}")
        expected, said = _VALUES.get(known[key].annotation, (object, ""))
        if not isinstance(value, expected) or (isinstance(value, bool) and expected is Real):
            raise ValueError(f"{key} is {value!r}; it must be {said}")


def check_dropout(dropout: float) -> None:
    """Raise a ValueError where this is no share that may be dropped."""
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}; it is a share of experts, so take 0 <= dropout < 1")


def check_weight_scale(weight_scale: float) -> None:
    """Raise a ValueError where this is no positive, finite number."""
    if not 0.0 < weight_scale < math.inf:
        raise ValueError(f"weight_scale is {weight_scale}; it multiplies weights, so take a number above 0")


def flatten_tokens(x: Tensor, mask: Tensor | None, dim: int) -> tuple[Tensor, Tensor | None]:
    """Fold all leading dimensions of x (..., dim) and of its mask (...) into one of tokens.

    Returns:
        x (T, dim) and the mask (T,) bool, or None where there is none.

    Raises:
        TypeError: x is not floating point.
        ValueError: the last dimension is not `dim`, or the mask does not fit x.
    """
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}; pass floating-point hidden states, for example x.float()")
    if x.shape[-1:] != (dim,):
        raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension must be the layer's dim = {dim}")
    if mask is None:
        return x.reshape(-1, dim), None
    if mask.shape != x.shape[:-1]:
        raise ValueError(f"mask has shape {tuple(mask.shape)}; for this x it must be {tuple(x.shape[:-1])}")
    return x.reshape(-1, dim), mask.reshape(-1).bool()
