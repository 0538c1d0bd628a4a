"""Memory of one rank of many, as PyTorch's MemTracker counts it, beside what `peerlm plan` says of it.

    python benchmarks/planned_memory.py                        # a billion experts of width 4,096 over 32 x 32 ranks
    python benchmarks/planned_memory.py --cols 8 --rows 8 --dim 1024 --json rows.jsonl

All other ranks are feigned and tensors have no numbers: a step is built, run forwards and backwards, and made by
RowAdamW, with bfloat16 rows, no first moment, and one second moment for 128 columns (`fused`). Nothing is measured but
shapes, so that no GPU is needed.
"""

# ruff: noqa: T201, a table on the terminal is what this is for

import argparse
import datetime
import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from peerlm.model import PeerConfig
from peerlm.optim import RowAdamW, parameter_groups
from peerlm.optim.sparse_gradients import teach_torch_sparse_norms
from peerlm.parallel import build, mesh
from peerlm.parallel.cost import Shape, Tables, memory

GB = 1e9


def tracked(options: argparse.Namespace) -> tuple[dict[str, int], int]:
    """Bytes at the peak of a step by the tracker's kinds, and how many numbers the rest of the model has."""
    ranks = mesh(rows=options.rows, cols=options.cols, device_type="cpu")
    peer = {"num_experts": options.sub_keys**2, "key_dim": 128, "row_format": "bfloat16"}
    config = PeerConfig(
        vocab_size=256,
        hidden_size=options.dim,
        num_hidden_layers=options.layers,
        num_attention_heads=options.dim // 128,
        ffw_layers=["peer"] * options.layers,
        peer={**peer, "heads": 8, "experts_per_head": 16},
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build(config, ranks)
        groups = parameter_groups(model)
        next(group for group in groups if group["name"] == "table").update(betas=(0.0, 0.98), row_wise=128)
        optimizer = RowAdamW(groups, fused=True)
        ids = torch.randint(0, 256, (1, options.tokens))
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        of_tables = ("rows", "sub_keys", "query_proj.weight")
        rest = sum(each.numel() for name, each in model.named_parameters() if not name.endswith(of_tables))
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    return {str(kind).rpartition(".")[2]: size for kind, size in peak.items() if size}, rest


def main() -> None:
    """Track, plan, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sub-keys", type=int, default=31624, help="sub-keys of each half: experts are their square")
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--cols", type=int, default=32)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="of a rank")
    parser.add_argument("--json", type=Path, help="append a row to this file")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=options.rows * options.cols)
    teach_torch_sparse_norms()
    found, rest = tracked(options)
    settings: dict[str, Any] = {"row_format": "bfloat16", "fused": True, "activation_bytes": 4}
    tables = Tables(
        num_rows=options.sub_keys**2,
        dim=options.dim,
        layers=options.layers,
        tokens=options.tokens,
        dense_parameters=rest,
        **settings,
    )
    planned = memory(tables, Shape(cols=options.cols, rows=options.rows))
    total, whole = found.pop("Total"), sum(planned.values())
    print("| tracked | GB | planned | GB |\n|---|---|---|---|")
    for line in range(max(len(found), len(planned))):
        sides = [list(side.items())[line : line + 1] for side in (found, planned)]
        print("| " + " | ".join(f"{side[0][0]} | {side[0][1] / GB:.3f}" if side else " | " for side in sides) + " |")
    print(f"| all | {total / GB:.3f} | all | {whole / GB:.3f} |")
    if options.json:
        sizes = {name: value for name, value in vars(options).items() if name != "json"}
        row = {**sizes, "tracked_bytes": total, "planned_bytes": whole, "ratio": round(whole / total, 4)}
        row |= {"tracked": found, "planned": planned, "torch": torch.__version__}
        with options.json.open("a") as file:
            file.write(json.dumps({**row, "date": datetime.date.today().isoformat()}) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
