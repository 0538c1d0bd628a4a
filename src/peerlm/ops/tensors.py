"""What can be asked of tensors: whether they are plain memory, and whether looking at them waits for a device."""

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.utils.weak import WeakTensorKeyDictionary

_PLAIN = (Tensor, torch.nn.Parameter)
_NUMBERS = WeakTensorKeyDictionary()
"""What was read of tensors, and which version of each it was."""


def not_plain(*maybe_tensors: Tensor | None) -> str:
    """Why kernels and autograd functions of ours cannot take these tensors; empty where they can.

    They read memory and have a gradient. A subclass that keeps its values elsewhere, `torch.func`'s transforms and
    forward-mode differentiation each need PyTorch's own operations. A tracer's tensors are taken: operators have fakes.
    """
    if torch.compiler.is_compiling():
        return ""  # what is traced was looked at by the tracer
    for tensor in maybe_tensors:
        if type(tensor) not in _PLAIN and tensor is not None and _has_its_own_operations(tensor):
            return f"a tensor is a {type(tensor).__name__}, which is not a plain torch.Tensor"
    if _functorch.peek_interpreter_stack() is None and forward_ad._current_level < 0:
        return ""
    tensors = [tensor for tensor in maybe_tensors if tensor is not None]
    if any(map(_functorch.is_functorch_wrapped_tensor, tensors)):
        return "a tensor is within a transform of torch.func"
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        return "a tensor has a tangent, of forward-mode differentiation"
    return ""


def read_at_once(device: torch.device) -> bool:
    """Whether numbers on this device can be looked at without waiting: other devices compute while Python runs on."""
    return device.type == "cpu"


def number_in(tensor: Tensor) -> float:
    """The one number in a tensor, which is rarely changed: a device is waited for only after a change.

    Changes by way of `.data` are not seen.
    """
    if not has_values(tensor) or read_at_once(tensor.device) or tensor.is_inference():
        return tensor.item()
    version, number = _NUMBERS.get(tensor, (None, 0.0))
    if version != tensor._version:
        version, number = tensor._version, tensor.item()
        _NUMBERS[tensor] = version, number
    return number


def has_values(tensor: Tensor) -> bool:
    """Whether the values of a tensor are there to be looked at: it is not traced, batched or fake."""
    if torch.compiler.is_compiling() or type(tensor) not in _PLAIN or tensor.is_meta:
        return False
    return _functorch.peek_interpreter_stack() is None


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor is a shape without values outside of a compiler: of FakeTensorMode, as of a dry run."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor) and not torch.compiler.is_compiling()


def may_have_holes(ids: Tensor) -> bool:
    """Whether an id is -1, which names no row; True where that cannot be known, as of a traced tensor."""
    return not has_values(ids) or bool((ids == -1).any())


def _has_its_own_operations(tensor: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    plain_memory = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    return not plain_memory and not isinstance(tensor, (FakeTensor, FunctionalTensor))
