"""Which rows and columns of a table each rank holds: numbers alone, no tensors and no processes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows that lie one after another, in the whole table and at the rank that holds them."""

    segment: int
    """Number of the segment that they are of."""
    first: int
    """Number of the first one in the whole table."""
    local: int
    """Number of the first one among those of the rank."""
    count: int
    """How many there are, at least 1."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A rank's part of a piece: what one entry of a checkpoint holds."""

    piece: Piece
    row_rank: int
    """Place of the rank along "rows"."""
    column_rank: int
    """Place of the rank along "cols"."""
    column: int
    """Number of the first column."""
    width: int
    """How many columns, at least 1."""


@dataclass(frozen=True, kw_only=True)
class RowLayout:
    """How a table (N, *X, D) is cut over a mesh: its rows over "rows", its columns over "cols".

    Rows lie in segments: those at the start, then those of each growth. Each segment is cut by PyTorch's rule for
    chunks: pieces of ceil(n / ranks) rows, the last ones shorter or empty. So growth moves no row.
    Columns are cut by the same rule.

    Raises:
        ValueError: a number is too small.
    """

    segments: tuple[int, ...]
    """Rows of each segment, in order."""
    width: int
    """D, columns of the whole table."""
    rows: int = 1
    """Ranks that rows are cut over."""
    cols: int = 1
    """Ranks that columns are cut over."""

    def __post_init__(self) -> None:
        if not self.segments or min(self.segments) < 0:
            raise ValueError(f"segments are {self.segments}; there must be one or more, each of 0 rows or more")
        for name in ("width", "rows", "cols"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def num_rows(self) -> int:
        """N."""
        return sum(self.segments)

    def pieces(self, row_rank: int) -> tuple[Piece, ...]:
        """What rows this rank holds, in the order in which it holds them; empty pieces are left out."""
        found, first, local = [], 0, 0
        for segment, length in enumerate(self.segments):
            begin, count = chunk(length, self.rows, row_rank)
            if count:
                found.append(Piece(segment=segment, first=first + begin, local=local, count=count))
            first += length
            local += count
        return tuple(found)

    def num_local(self, row_rank: int) -> int:
        """How many rows this rank holds."""
        return sum(piece.count for piece in self.pieces(row_rank))

    def columns(self, column_rank: int) -> tuple[int, int]:
        """The first column of a rank, and how many it holds."""
        return chunk(self.width, self.cols, column_rank)

    def owner(self, row: int) -> tuple[int, int]:
        """Which rank along "rows" holds a row, and as which of its own.

        Raises IndexError where there is no such row.
        """
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row} is not in 0 .. {self.num_rows - 1}")
        ends = list(accumulate(self.segments))
        segment = next(number for number, end in enumerate(ends) if row < end)
        within = row - ends[segment] + self.segments[segment]
        rank = within // -(-self.segments[segment] // self.rows)
        piece = next(each for each in self.pieces(rank) if each.segment == segment)
        return rank, row - piece.first + piece.local

    def blocks(self) -> Iterator[Block]:
        """Every rank's blocks: together they cover each entry of the table once."""
        for row_rank in range(self.rows):
            for piece in self.pieces(row_rank):
                for column_rank in range(self.cols):
                    column, width = self.columns(column_rank)
                    if width:
                        yield Block(piece=piece, row_rank=row_rank, column_rank=column_rank, column=column, width=width)

    def grown(self, num_rows: int) -> "RowLayout":
        """The layout with more rows, which are one more segment; raises ValueError where there would not be more."""
        more = num_rows - self.num_rows
        if more <= 0:
            raise ValueError(f"num_rows is {num_rows}; a table of {self.num_rows} rows can only grow")
        return replace(self, segments=(*self.segments, more))


def chunk(length: int, ranks: int, rank: int) -> tuple[int, int]:
    """Where a rank's part of `length` things begins, and how many there are: the rule of `torch.chunk` and DTensor."""
    size = -(-length // ranks)
    begin = min(rank * size, length)
    return begin, min(size, length - begin)
