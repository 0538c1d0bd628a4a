"""What a compiled graph cannot do with rows: one graph is refused in a sentence, more graphs have the right result."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from peerlm.layers import Table
from peerlm.layers.mapped.cached import cache_tables
from peerlm.layers.mapped.place import RowPlace
from peerlm.layers.mapped.table import mapped_in
from peerlm.layers.table import tables_as
from peerlm.ops import api
from peerlm.optim import RowAdamW, parameter_groups
from peerlm.parallel import mesh
from peerlm.parallel.place import Place
from peerlm.parallel.table import sharded_at

pytestmark = [
    pytest.mark.whole_tables("makes each kind of table itself"),
    pytest.mark.filterwarnings("default"),  # torch.compile warns of what it does
]
N, D, P = 40, 6, 3
X, WEIGHTS, IDS = torch.randn(4, D), torch.rand(4, P), torch.arange(4 * P).view(4, P)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def stale() -> Table:
    """A table most of whose rows RowAdamW has left as they were before a step."""
    table = filled(Table(N, D))
    optimizer = RowAdamW(parameter_groups(table), lr=0.1)
    table.dot(X, IDS % 2).sum().backward()
    optimizer.step()
    table.optimizer = optimizer
    return table


@pytest.fixture
def cached(tmp_path: Path) -> Iterator[Table]:
    place = RowPlace(tmp_path / "rows", owner="run")
    with tables_as(mapped_in(place)):
        table = filled(Table(N, D))
    cache_tables(table, torch.device("cpu"), N)
    yield table
    place.close()


@pytest.fixture
def sharded() -> Iterator[Table]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    with tables_as(sharded_at(Place.of(mesh(rows=1, cols=1, device_type="cpu")))):
        table = filled(Table(N, D))
    yield table
    dist.destroy_process_group()


def filled(table: Table) -> Table:
    table.write(torch.randn(N, D, generator=torch.Generator().manual_seed(1)))
    return table


CALLS: dict[str, Callable[[Table], Tensor]] = {
    "mix": lambda table: table.mix(2 * WEIGHTS, IDS) + 1,
    "dot": lambda table: table.dot(2 * X, IDS) + 1,
    "gather": lambda table: table.gather(IDS + 1) + 1,
    "read": lambda table: table.read(2, 5) + 1,
}
SENTENCES = {
    "stale": "RowAdamW brings rows up to date before they are read, which a compiled graph cannot do: "
    "compile without fullgraph=True; export in evaluation mode with strict=False",
    "cached": "the host fetches the rows that a device does not have, which a compiled graph cannot do: "
    "compile without fullgraph=True",
    "sharded": "ranks exchange the tokens of a sharded table, which a compiled graph cannot do: "
    "compile without fullgraph=True",
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", SENTENCES)
def test_a_look_up_is_outside_of_graphs(kind: str, call: str, request: pytest.FixtureRequest) -> None:
    table, run = request.getfixturevalue(kind), CALLS[call]
    with torch.no_grad():
        with pytest.raises(torch._dynamo.exc.Unsupported) as caught:
            torch.compile(run, fullgraph=True, backend="eager")(table)
        assert SENTENCES[kind] in str(caught.value)
        found = torch.compile(run, backend="eager")(table)
        assert torch.equal(found, run(table))


ROWS = torch.randn(N, D)
GIVEN_BY_ROW: dict[str, Callable[[], Tensor]] = {
    "mix_experts": lambda: api.mix_experts(X, WEIGHTS, IDS, ROWS.view(N // 2, 2, D), row_gradients=True) + 1,
    "mix_values": lambda: api.mix_values(WEIGHTS, IDS, ROWS, row_gradients=True) + 1,
    "dot_values": lambda: api.dot_values(X, IDS, ROWS, row_gradients=True) + 1,
}


@pytest.mark.parametrize("name", GIVEN_BY_ROW)
def test_a_gradient_by_row_is_outside_of_graphs(name: str) -> None:
    run = GIVEN_BY_ROW[name]
    with pytest.raises(torch._dynamo.exc.Unsupported) as caught:
        torch.compile(run, fullgraph=True, backend="eager")()
    assert (
        "the gradient of a table that RowAdamW trains is given by row, which a compiled graph cannot do: "
        "compile without fullgraph=True"
    ) in str(caught.value)
    assert torch.equal(torch.compile(run, backend="eager")(), run())
