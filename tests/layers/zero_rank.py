"""One of two processes that train two balanced routers under DistributedDataParallel.

Each kind of optimizer makes a step on the rank's own batch; FOLDER/RANK.json gets the biases after it, by kind.
"""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from peerlm.layers.balanced_router import BalancedRouter


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.routers = nn.ModuleList(
            BalancedRouter(8, num_experts=4, experts_per_token=1, balance_step=1.0) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        first, second = (router(x * scale)[0] for router, scale in zip(self.routers, (1, -1), strict=True))
        return first.sum() + second.sum()


def train(zero: bool) -> list[list[float]]:
    torch.manual_seed(0)
    model = Two()
    ddp = DistributedDataParallel(model)
    if zero:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # which warns of torch.jit

        optimizer: torch.optim.Optimizer = ZeroRedundancyOptimizer(
            ddp.parameters(), optimizer_class=torch.optim.AdamW, lr=0.0
        )
    else:
        optimizer = torch.optim.AdamW(ddp.parameters(), lr=0.0)
    for step in range(3):
        ddp(torch.randn(9, 8, generator=torch.Generator().manual_seed(2 * step + dist.get_rank()))).backward()
        optimizer.step()
    return [router.bias.tolist() for router in model.routers]


def biases(folder: Path) -> None:
    dist.init_process_group("gloo")
    found = {"whole": train(zero=False), "shared out": train(zero=True)}
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
