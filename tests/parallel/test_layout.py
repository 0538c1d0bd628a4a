"""Layouts as sets of rows: each row and column has one owner, and growth moves none."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peerlm.parallel.layout import RowLayout, chunk

layouts = st.builds(
    RowLayout,
    segments=st.lists(st.integers(0, 23), min_size=1, max_size=4).map(tuple),
    width=st.integers(1, 12),
    rows=st.integers(1, 6),
    cols=st.integers(1, 4),
)


@given(st.integers(0, 40), st.integers(1, 9))
def test_a_chunk_is_that_of_torch(length: int, ranks: int) -> None:
    whole = torch.arange(length)
    parts = list(whole.chunk(ranks)) + [whole[:0]] * ranks
    for rank in range(ranks):
        begin, count = chunk(length, ranks, rank)
        assert whole[begin : begin + count].tolist() == (parts[rank].tolist() if length else [])


@given(layouts)
def test_each_row_has_one_owner_who_holds_it_where_the_layout_says(layout: RowLayout) -> None:
    seen = []
    for rank in range(layout.rows):
        for piece in layout.pieces(rank):
            for offset in range(piece.count):
                assert layout.owner(piece.first + offset) == (rank, piece.local + offset)
                seen.append(piece.first + offset)
    assert sorted(seen) == list(range(layout.num_rows))
    assert sum(map(layout.num_local, range(layout.rows))) == layout.num_rows


@given(layouts)
def test_blocks_cover_every_entry_once(layout: RowLayout) -> None:
    covered = torch.zeros(layout.num_rows, layout.width, dtype=torch.int64)
    for block in layout.blocks():
        piece = block.piece
        covered[piece.first : piece.first + piece.count, block.column : block.column + block.width] += 1
    assert bool((covered == 1).all())


@given(layouts, st.integers(1, 30))
def test_growth_moves_no_row(layout: RowLayout, more: int) -> None:
    grown = layout.grown(layout.num_rows + more)
    for row in range(layout.num_rows):
        assert grown.owner(row) == layout.owner(row)
    for rank in range(layout.rows):
        assert grown.num_local(rank) - layout.num_local(rank) == chunk(more, layout.rows, rank)[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"segments": ()}, "segments are"),
        ({"segments": (3, -1)}, "segments are"),
        ({"rows": 0}, "rows is 0"),
        ({"cols": 0}, "cols is 0"),
        ({"width": 0}, "width is 0"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RowLayout(**{"segments": (4,), "width": 2, **changes})  # type: ignore[arg-type]


def test_a_table_does_not_shrink_and_has_no_rows_beyond_its_last() -> None:
    layout = RowLayout(segments=(4,), width=2)
    with pytest.raises(ValueError, match="can only grow"):
        layout.grown(4)
    with pytest.raises(IndexError, match="row 4 is not in 0"):
        layout.owner(4)
