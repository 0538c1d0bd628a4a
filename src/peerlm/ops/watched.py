"""The class of a tensor of rows that an optimizer watches: its readers find all rows up to date.

PyTorch tells a tensor's class of every function that takes the tensor. Before those that read data all rows catch up;
those that ask for a gradient, a shape or a name do not wait, so that a training step never sweeps a table. Views of the
tensor are of such a class too. Copies and pickles are of the class that the tensor had before.
"""

import copy
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

_CATCH_UP = "_peerlm_catch_up"

# What a training step asks without reading data, named as in `torch.Tensor` and `torch`; all else waits for the rows.
_GETTERS = """
    grad grad_fn requires_grad is_leaf retains_grad output_nr shape dtype device layout ndim itemsize nbytes names name
    is_cpu is_cuda is_xpu is_mps is_meta is_sparse is_sparse_csr is_quantized is_nested is_mkldnn
    _version _base _cdata _grad _backward_hooks _post_accumulate_grad_hooks
"""
_SETTERS = "grad requires_grad _backward_hooks _post_accumulate_grad_hooks"
# Not is_complex, which torch.distributed asks before it sends the memory.
_METHODS = """
    __len__ __hash__ size dim ndimension numel nelement element_size stride storage_offset get_device is_floating_point
    is_contiguous is_signed is_inference requires_grad_ retain_grad register_hook register_post_accumulate_grad_hook
    new_empty new_zeros new_ones new_full
"""
_FUNCTIONS = """
    is_floating_point numel is_inference is_same_size empty_like zeros_like ones_like full_like rand_like randn_like
    _has_compatible_shallow_copy_type
"""


_WITHOUT_DATA: frozenset[Any] = frozenset(
    [
        *(getattr(Tensor, name).__get__ for name in _GETTERS.split() if hasattr(Tensor, name)),
        *(getattr(Tensor, name).__set__ for name in _SETTERS.split()),
        *(getattr(Tensor, name) for name in _METHODS.split()),
        *(getattr(torch, name) for name in _FUNCTIONS.split() if hasattr(torch, name)),
        Tensor.grad.__delete__,  # type: ignore[union-attr]
    ]
)


def watch_reads(tensor: Any, catch_up: Callable[[], object]) -> None:
    """Let `catch_up` be called whenever a function is about to read or change the data of `tensor`, in place."""
    base: type[Tensor] = type(tensor)
    if base not in (Tensor, torch.nn.Parameter) and not isinstance(tensor, Watched):
        raise TypeError(f"rows are of class {base.__name__}; only plain parameters can be trained by rows")
    tensor.__dict__[_CATCH_UP] = catch_up
    if not isinstance(tensor, Watched):
        tensor.__class__ = _watched(base)


class Watched:
    """Mixed into the class of a watched tensor, and of views of one."""

    __slots__ = ()

    @classmethod
    def __torch_function__(
        cls, function: Any, kinds: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        options = options or {}
        with torch._C.DisableTorchFunctionSubclass():
            if not _reads_data(function):
                return function(*arguments, **options)
            if function is Tensor.share_memory_:
                raise RuntimeError(
                    "a table that RowAdamW trains cannot be shared with other processes, which would not see rows "
                    "catch up: share a copy, copy.deepcopy(layer).share_memory()"
                )
            sources = [*_watched_among(arguments), *_watched_among(options.values())]
            for source in sources:
                source.__dict__[_CATCH_UP]()
            return with_views(function(*arguments, **options), sources)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        with _as_before(self) as tensor:
            return repr(tensor)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        with _as_before(self) as tensor:
            return copy.deepcopy(tensor, memo)

    def __reduce_ex__(self, proto: Any) -> Any:
        with _as_before(self) as tensor:
            return tensor.__reduce_ex__(proto)


def raw(tensor: Tensor) -> Tensor:
    """The data of a tensor as it is, for the optimizer that watches it: in place without a new version."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.data


@contextmanager
def _as_before(watched: Any) -> Iterator[Tensor]:
    """The tensor, up to date, for a while of the class and with the attributes that it has without one."""
    kind, attributes = type(watched), dict(watched.__dict__)
    with torch._C.DisableTorchFunctionSubclass():
        attributes[_CATCH_UP]()
        watched.__class__ = kind.__bases__[-1]
        for name in [name for name in attributes if name.startswith("_peerlm_")]:
            del watched.__dict__[name]
        try:
            yield watched
        finally:
            watched.__dict__.update(attributes)
            watched.__class__ = kind


@cache
def _watched(base: type[Tensor]) -> type[Tensor]:
    kind = types.new_class(f"Watched{base.__name__}", (Watched, base))
    # Another process would share the memory, and not see rows catch up: it gets a copy.
    ForkingPickler.register(kind, lambda tensor: reduce_tensor(copy.deepcopy(tensor)))
    return kind


def _watched_among(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Watched):
            yield value  # type: ignore[misc]
        elif isinstance(value, (list, tuple)):
            yield from _watched_among(value)


def with_views(result: Any, sources: Sequence[Tensor]) -> Any:
    """The result, in which tensors that share memory with a watched source are watched as that is."""
    if isinstance(result, (list, tuple)):
        for each in result:
            with_views(each, sources)
    elif type(result) is Tensor and result.layout == torch.strided:
        for source in sources:
            if result.untyped_storage().data_ptr() == source.untyped_storage().data_ptr():
                watch_reads(result, source.__dict__[_CATCH_UP])
    return result


def _reads_data(function: Any) -> bool:
    if function in _WITHOUT_DATA:
        return False
    # Backward passes of our own operators read the rows that their forward passes have prepared.
    name = str(function) if type(function).__module__ == "torch._ops" else ""
    return not (name.startswith("peerlm") and "_backward" in name)
