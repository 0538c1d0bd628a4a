"""The mesh over ranks, all but one of which are feigned."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from peerlm.parallel import mesh


@pytest.fixture
def eight_ranks() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
    yield
    dist.destroy_process_group()


def test_rows_are_the_ranks_of_a_node_and_columns_cross_nodes(
    eight_ranks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    planned = mesh()
    assert planned.mesh_dim_names == ("replica", "cols", "rows")
    assert planned.shape == (1, 2, 4)
    assert list(planned.get_coordinate() or ()) == [0, 1, 1]


def test_what_is_left_is_worked_out(eight_ranks: None) -> None:
    assert mesh(cols=4).shape == (1, 4, 2)
    assert mesh(rows=2, replica=2).shape == (2, 2, 2)


def test_sizes_that_do_not_make_the_number_of_ranks_are_refused(eight_ranks: None) -> None:
    with pytest.raises(ValueError, match="1 x 1 x 3, but 8 ranks"):
        mesh(rows=3, cols=1)
    with pytest.raises(ValueError, match="8 ranks"):
        mesh(rows=16)
