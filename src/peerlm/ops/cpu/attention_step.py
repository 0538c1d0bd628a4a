"""One new token of each of a few sequences through a block's attention, or through all blocks, in one native call."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peerlm.ops.attention_step import AddedNorm, AttentionStep, Columns, Layer, RMSNorm, Step, Through
from peerlm.ops.cpu import native
from peerlm.ops.cpu.decode import FewTokens, is_plain


def attention_step(step: AttentionStep) -> Step | None:
    """As `api.attention_step`, for plain contiguous tensors on a CPU in float32."""
    if not native.joins_calls() or not all(map(is_plain, step.tensors())):
        return None
    return _Step(step)


def added_norm(norm: RMSNorm) -> AddedNorm | None:
    """As `api.added_norm`, likewise."""
    return None if not native.joins_calls() or not is_plain(norm.weight) else _Norm(norm)


def through_blocks(steps: Sequence[Step], layers: Sequence[Layer], last: AddedNorm) -> Through | None:
    """As `api.through_blocks`, of what is made here alone."""
    if not isinstance(last, _Norm):
        return None
    found = []
    for step, layer in zip(steps, layers, strict=True):
        if not isinstance(step, _Step) or not isinstance(layer, FewTokens):
            return None
        dense = isinstance(layer.native, native.module.DenseLayer)
        found.append((step, (None, layer.native) if dense else (layer.native, None)))
    run = native.module.blocks([step.native for step, _ in found], [layer for _, layer in found], last.native).run

    def through(hidden: Tensor, columns: Sequence[Columns], mask: Tensor | None, positions: Tensor) -> Tensor | None:
        places = [step.place(hidden, *own) for (step, _), own in zip(found, columns, strict=True)]
        width = columns[0][0].shape[2]
        if None in places or any(keys.shape[2] != width for keys, _ in columns):
            return None
        if not (is_plain(hidden) and _fits(hidden, width, mask, positions)):
            return None
        y = torch.empty_like(hidden)
        done = run(hidden.data_ptr(), len(hidden), places, *_given(width, mask, positions, y))
        return y if done else None

    return through


class _Step:
    """As `attention_step.Step`."""

    def __init__(self, step: AttentionStep):
        heads = step.query_norm, step.key_norm
        query_norm, key_norm = (None if norm is None else norm.weight.detach() for norm in heads)
        epsilons = {norm.epsilon for norm in heads if norm is not None} or {0.0}
        if len(epsilons) > 1:
            raise ValueError(f"norms of queries and keys have epsilons of their own: {sorted(epsilons)}")
        self.native = native.module.attention_step(
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
            epsilons.pop(),
            step.frequencies,
            step.rotation_scale,
            step.scaling,
            None if step.shift is None else tuple(weight.detach() for weight in step.shift.tensors()),
        )
        self._key_size = 2 * len(step.frequencies) + (step.shift is not None)
        self._dim, self._size = len(step.before.weight), 2 * len(step.frequencies)
        self._groups = len(step.key_map) // self._size

    def __call__(
        self,
        hidden: Tensor,
        added: Tensor | None,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        positions: Tensor,
    ) -> Tensor | None:
        place, columns = self.place(hidden, keys, values), keys.shape[2]
        if place is None or not (is_plain(hidden) and _fits(hidden, columns, mask, positions)):
            return None
        if added is not None and not (added.shape == hidden.shape and is_plain(added)):
            return None
        y = torch.empty_like(hidden)
        rows, to_add = len(hidden), 0 if added is None else added.data_ptr()
        done = self.native.run(hidden.data_ptr(), rows, to_add, place, *_given(columns, mask, positions, y))
        return y if done else None

    def place(self, hidden: Tensor, keys: Tensor, values: Tensor) -> tuple[int, ...] | None:
        """Where keys and values are, and strides of rows and heads of each; None where they cannot be of this step."""
        rows, shape, strides, others = len(hidden), keys.shape, keys.stride(), values.stride()
        columns = (rows, self._groups, shape[2])
        if shape != (*columns, self._key_size) or values.shape != (*columns, self._size):
            return None
        if hidden.shape != (rows, 1, self._dim):
            return None
        if strides[2:] != (self._key_size, 1) or others[2:] != (self._size, 1):
            return None
        if not (keys.dtype == values.dtype == torch.float32 and keys.is_cpu and values.is_cpu):
            return None
        return keys.data_ptr(), values.data_ptr(), *strides[:2], *others[:2]


class _Norm:
    """As `attention_step.AddedNorm`."""

    def __init__(self, norm: RMSNorm):
        self.native = native.module.norm(norm.weight.detach(), norm.epsilon)

    def __call__(self, hidden: Tensor, added: Tensor | None) -> Tensor:
        assert is_plain(hidden)
        assert added is None or (added.shape == hidden.shape and is_plain(added))
        y = torch.empty_like(hidden)
        rows = hidden.numel() // hidden.shape[-1]
        self.native.run(hidden.data_ptr(), rows, 0 if added is None else added.data_ptr(), y.data_ptr())
        return y


def _fits(hidden: Tensor, columns: int, mask: Tensor | None, positions: Tensor) -> bool:
    rows = len(hidden)
    if positions.shape not in ((rows, 1), (1, 1)) or not _is_plain_int64(positions):
        return False
    return mask is None or (mask.shape == (rows, columns) and _is_plain_int64(mask))


def _given(columns: int, mask: Tensor | None, positions: Tensor, y: Tensor) -> tuple[Any, ...]:
    """The last arguments of a step, which are the same in all blocks."""
    to_mask, stride = 0 if mask is None else mask.data_ptr(), 0 if len(positions) == 1 else 1
    return columns, to_mask, positions.data_ptr(), stride, torch.get_num_threads(), y.data_ptr()


def _is_plain_int64(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.dtype == torch.int64 and tensor.is_contiguous()
