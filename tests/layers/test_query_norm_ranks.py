"""Two processes with a part of the batch each equal one process with all of it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peerlm.layers import QueryBatchNorm

RANK = Path(__file__).with_name("query_norm_rank.py")


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    rows, masks = (torch.randn(5, 3).double(), torch.randn(2, 3).double() + 3), ([1, 1, 0, 1, 1], [1, 0])
    batch = [
        (x, torch.tensor(mask, dtype=torch.bool), torch.randn_like(x)) for x, mask in zip(rows, masks, strict=True)
    ]
    torch.save(batch, tmp_path / "batch.pt")
    ranks = [
        subprocess.Popen(
            [sys.executable, RANK, str(rank), *(tmp_path / n for n in ("store", "batch.pt", f"{rank}.pt"))],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    logs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], logs
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]

    norm = QueryBatchNorm(3).double()
    x, mask, coefficients = (torch.cat(parts) for parts in zip(*batch, strict=True))
    x.requires_grad_()
    out = norm(x, mask)
    (out * coefficients * mask[:, None]).sum().backward()

    torch.testing.assert_close(torch.cat([result["out"] for result in results]), out.detach())
    torch.testing.assert_close(torch.cat([result["x"] for result in results]), x.grad)
    for name, parameter in norm.named_parameters():
        torch.testing.assert_close(sum(result[name] for result in results), parameter.grad)
    for name, statistic in norm.named_buffers():
        for result in results:
            torch.testing.assert_close(result[name], statistic)
