"""Two processes with a part of the batch each equal one process with all of it; one may also train alone."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from peerlm.layers import QueryBatchNorm, share_statistics

from ..processes import ranks
from .query_norm_rank import share


@pytest.mark.slow
def test_two_ranks_equal_one_where_they_share_statistics_and_do_not_wait_where_not(tmp_path: Path) -> None:
    rows, masks = (torch.randn(5, 3).double(), torch.randn(2, 3).double() + 3), ([1, 1, 0, 1, 1], [1, 0])
    batch = [
        (x, torch.tensor(mask, dtype=torch.bool), torch.randn_like(x)) for x, mask in zip(rows, masks, strict=True)
    ]
    torch.save(batch, tmp_path / "batch.pt")
    with ranks(2, tmp_path, share, tmp_path) as both:
        assert both.wait() == [0, 0], both.said()
    results: list[dict[str, Any]] = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]

    (told,) = results[0]["alone"]
    assert "takes statistics of its own batch alone" in told
    assert "share_statistics(model, group)" in told

    norm = QueryBatchNorm(3).double()
    x, mask, coefficients = (torch.cat(parts) for parts in zip(*batch, strict=True))
    x.requires_grad_()
    out = norm(x, mask)
    (out * coefficients * mask[:, None]).sum().backward()
    for how in ("group", "ddp", "checkpoint"):
        found = [result[how] for result in results]
        torch.testing.assert_close(torch.cat([each["out"] for each in found]), out.detach(), msg=how)
        torch.testing.assert_close(torch.cat([each["x"] for each in found]), x.grad, msg=how)
        for name, parameter in norm.named_parameters():
            shares = sum(each[name] for each in found)
            # (under DDP each of the two has the mean)
            torch.testing.assert_close(shares, parameter.grad, msg=f"{how}: {name}")
        for name, statistic in norm.named_buffers():
            for each in found:
                torch.testing.assert_close(each[name], statistic, msg=f"{how}: {name}")


def test_copies_belong_to_no_group() -> None:
    norm = QueryBatchNorm(3)
    norm.process_group = norm._last_group = object()  # type: ignore[assignment]
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert twin.process_group is None
        assert twin._last_group is None
    share_statistics(torch.nn.Sequential(norm), None)
    assert norm.process_group is None
