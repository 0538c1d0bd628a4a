"""What torch.compile is told of functions; telling it does not import the compiler, which takes a second."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_F = TypeVar("_F", bound=Callable[..., Any])


def constant_in_graphs(function: _F) -> _F:
    """Let torch.compile call a function once, untraced: `torch.compiler.assume_constant_result` without its import."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def never_compiled(reason: str, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Call a function, outside of the graphs that torch.compile makes.

    reason: what a user is told who asks for one graph, as a sentence with the fix.
    """
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break(msg=reason)  # or fullgraph=True tells PyTorch's own reason
        return torch.compiler.disable(_call, reason=reason)(function, *arguments)
    return function(*arguments)


def _call(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return function(*arguments)
