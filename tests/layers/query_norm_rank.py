"""One of two processes that share a QueryBatchNorm: `query_norm_rank.py RANK STORE BATCH RESULT`.

Reads rows, mask and coefficients of the rank from BATCH, writes output, gradients and statistics to RESULT.
"""

import sys

import torch
import torch.distributed as dist

from peerlm.layers import QueryBatchNorm


def main(rank: int, store: str, batch: str, result: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    x, mask, coefficients = torch.load(batch)[rank]
    norm = QueryBatchNorm(x.shape[1]).double()
    x.requires_grad_()
    out = norm(x, mask)
    (out * coefficients * mask[:, None]).sum().backward()
    torch.save(
        {
            "out": out.detach(),
            "x": x.grad,
            "weight": norm.weight.grad,
            "bias": norm.bias.grad,
            "running_mean": norm.running_mean,
            "running_var": norm.running_var,
        },
        result,
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
