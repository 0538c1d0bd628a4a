"""A billion experts of width 4096 over 1,024 ranks, of which this process is one: shapes and memory, no numbers."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from peerlm.model import PeerConfig
from peerlm.optim import RowAdamW, parameter_groups
from peerlm.optim.sparse_gradients import teach_torch_sparse_norms
from peerlm.parallel import build, mesh, sharded_tables
from peerlm.parallel.cost import Shape, Tables, memory

N, DIM, ROWS, COLS, TOKENS = 31624**2, 4096, 32, 32, 64


@pytest.fixture
def a_thousand_ranks() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=ROWS * COLS)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_a_billion_experts_are_built_and_trained_over_a_thousand_ranks(a_thousand_ranks: None) -> None:
    teach_torch_sparse_norms()
    ranks = mesh(rows=ROWS, cols=COLS, device_type="cpu")
    peer = {"num_experts": N, "heads": 8, "experts_per_head": 16, "key_dim": 128, "row_format": "bfloat16"}
    config = PeerConfig(
        vocab_size=256,
        hidden_size=DIM,
        num_hidden_layers=1,
        num_attention_heads=32,
        intermediate_size=DIM,
        ffw_layers=["peer"],
        peer=peer,
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build(config, ranks)
        groups = parameter_groups(model)
        next(group for group in groups if group["name"] == "table").update(betas=(0.0, 0.98), row_wise=128)
        optimizer = RowAdamW(groups, fused=True)
        ids = torch.randint(0, 256, (1, TOKENS))
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        (table,) = sharded_tables(model).values()
        local = -(-N // ROWS)
        assert table.rows.shape == (local, 2, DIM // COLS)
        assert table.rows.nbytes == 2 * local * 2 * 128  # 16.0 GB of 16.4 TB
        kept = optimizer.state[table.rows]
        # one second moment and two steps for each row: 16 bytes beside its 512
        assert sum(kept[name].nbytes for name in ("exp_avg_sq", "moments_step", "weights_step")) == 16 * local
        assert "exp_avg" not in kept
        assert table.rows.grad is None
        assert all(parameter.numel() < 1e9 for parameter in model.parameters() if parameter is not table.rows)
        settings = {"row_format": "bfloat16", "fused": True, "tokens": TOKENS, "activation_bytes": 4}
        rest = sum(
            parameter.numel()
            for name, parameter in model.named_parameters()
            if not name.endswith(("rows", "sub_keys", "query_proj.weight"))
        )
        tables = Tables(num_rows=N, dim=DIM, dense_parameters=rest, **settings)  # type: ignore[arg-type]
        planned = memory(tables, Shape(cols=COLS, rows=ROWS))
        assert planned["rows"] == table.rows.nbytes
        assert planned["moments"] == kept["exp_avg_sq"].nbytes
        assert planned["counters"] == kept["moments_step"].nbytes + kept["weights_step"].nbytes
        (sub_keys,) = (each for name, each in model.named_parameters() if name.endswith("sub_keys"))
        of_keys = optimizer.state[sub_keys]
        assert planned["sub-keys"] == sub_keys.nbytes + of_keys["exp_avg"].nbytes + of_keys["exp_avg_sq"].nbytes
        tracked = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
        without_rows = sum(planned.values()) - planned["rows"], tracked - table.rows.nbytes
        print(f"memory of a rank: {tracked / 1e9:.2f} GB tracked, {sum(planned.values()) / 1e9:.2f} GB planned")  # noqa: T201
        assert sum(planned.values()) == pytest.approx(tracked, rel=0.03)
        assert without_rows[0] == pytest.approx(without_rows[1], rel=0.3)
