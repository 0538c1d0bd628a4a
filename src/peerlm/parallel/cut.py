"""A tensor of which this process holds blocks, as checkpoints see it: what is written, and where what is read goes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from peerlm.parallel.layout import RowLayout

MOST_BYTES = 50 * 10**9
"""Of one block of a table, and of one file of a checkpoint in shards: what hubs and object stores take."""


@dataclass(frozen=True)
class Cut:
    """Blocks of a tensor of some shape; no two share an entry, and all processes' together are the whole.

    It has the three methods that planners of torch.distributed.checkpoint ask a tensor for.
    """

    shape: torch.Size
    """Of the whole."""
    dtype: torch.dtype
    blocks: Sequence[tuple[tuple[int, ...], Tensor]]
    """Where each block begins in the whole, and its entries, which are read and written in place."""

    def size(self) -> torch.Size:
        """The shape of the whole."""
        return self.shape

    def block(self, offsets: Sequence[int] | None) -> Tensor:
        """The block that begins there; raises KeyError where there is none."""
        return dict(self.blocks)[tuple(offsets or ())]

    def copied(self) -> "Cut":
        """The same with copies of the blocks on the CPU."""
        return Cut(self.shape, self.dtype, [(offsets, copied(block)) for offsets, block in self.blocks])

    def __create_write_items__(self, name: str, whole: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk, properties=TensorProperties(dtype=self.dtype), size=self.shape
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offsets), block.shape) for offsets, block in self.blocks]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.block(index.offset)


def cut_rows(local: Tensor, layout: RowLayout, row_rank: int, column_rank: int) -> Cut:
    """This rank's part of a tensor that lies as a table's rows do.

    local: (n, ...), n this rank's rows. Where its last size is this rank's columns, or these divided, as where one
    number stands for 128 columns, it is cut by columns too; otherwise all ranks along "cols" have the same.
    """
    column, width = layout.columns(column_rank)
    last = local.shape[-1] if local.ndim > 1 else 0
    runs = width // last if last and width % last == 0 else 0
    by_columns = layout.cols > 1 and runs > 0
    shape = [layout.num_rows, *local.shape[1:]]
    begin = [0] * (local.ndim - 1)
    if by_columns:
        shape[-1], begin[-1] = layout.width // runs, column // runs
    at_once = max(1, MOST_BYTES // max(1, local[:1].nbytes))
    blocks = [
        ((piece.first + start, *begin), local[piece.local + start : piece.local + min(start + at_once, piece.count)])
        for piece in layout.pieces(row_rank)
        for start in range(0, piece.count, at_once)
    ]
    return Cut(torch.Size(shape), local.dtype, [(offsets, block) for offsets, block in blocks if block.numel()])


def copied(tensor: Tensor) -> Tensor:
    """A copy on the CPU, whatever the tensor is a view of."""
    return tensor.detach().to("cpu", copy=True).contiguous()
