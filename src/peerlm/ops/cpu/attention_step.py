"""A block's attention for one new token of each of a few sequences in one native call."""

import torch
from torch import Tensor

from peerlm.ops.attention_step import AddedNorm, AttentionStep, RMSNorm, Step
from peerlm.ops.cpu import native
from peerlm.ops.cpu.decode import is_plain


def attention_step(step: AttentionStep) -> Step | None:
    """As `api.attention_step`, for plain contiguous tensors on a CPU in float32."""
    if native.unavailable() or not all(map(is_plain, step.tensors())):
        return None
    heads = step.query_norm, step.key_norm
    query_norm, key_norm = (None if norm is None else norm.weight.detach() for norm in heads)
    run = native.module.attention_step(
        step.before.weight.detach(),
        step.before.epsilon,
        step.after.weight.detach(),
        step.after.epsilon,
        step.query_map.detach(),
        step.key_map.detach(),
        step.value_map.detach(),
        step.output_map.detach(),
        query_norm,
        key_norm,
        max([norm.epsilon for norm in heads if norm is not None], default=0.0),
        step.frequencies,
        step.rotation_scale,
        step.scaling,
    ).run
    dim, size = len(step.before.weight), 2 * len(step.frequencies)
    groups = len(step.key_map) // size

    def call(
        hidden: Tensor, added: Tensor | None, keys: Tensor, values: Tensor, mask: Tensor | None, positions: Tensor
    ) -> Tensor | None:
        rows, columns = len(hidden), keys.shape[2]
        strides = keys.stride()
        if not (
            hidden.shape == (rows, 1, dim)
            and is_plain(hidden)
            and (added is None or (added.shape == hidden.shape and is_plain(added)))
            and keys.shape == values.shape == (rows, groups, columns, size)
            and keys.dtype == values.dtype == torch.float32
            and keys.is_cpu
            and values.is_cpu
            and strides == values.stride()
            and strides[2:] == (size, 1)
            and (mask is None or (mask.shape == (rows, columns) and _is_plain_int64(mask)))
            and positions.shape in ((rows, 1), (1, 1))
            and _is_plain_int64(positions)
        ):
            return None
        y = torch.empty_like(hidden)
        done = run(
            hidden.data_ptr(),
            rows,
            0 if added is None else added.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            strides[0],
            strides[1],
            columns,
            0 if mask is None else mask.data_ptr(),
            positions.data_ptr(),
            0 if len(positions) == 1 else 1,
            torch.get_num_threads(),
            y.data_ptr(),
        )
        return y if done else None

    return call


def added_norm(norm: RMSNorm) -> AddedNorm | None:
    """As `api.added_norm`, likewise."""
    if native.unavailable() or not is_plain(norm.weight):
        return None
    run = native.module.norm(norm.weight.detach(), norm.epsilon).run

    def call(hidden: Tensor, added: Tensor | None) -> Tensor:
        assert is_plain(hidden) and (added is None or (added.shape == hidden.shape and is_plain(added)))
        y = torch.empty_like(hidden)
        rows = hidden.numel() // hidden.shape[-1]
        run(hidden.data_ptr(), rows, 0 if added is None else added.data_ptr(), y.data_ptr())
        return y

    return call


def _is_plain_int64(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.dtype == torch.int64 and tensor.is_contiguous()
