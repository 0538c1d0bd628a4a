"""Experts that write another width than they read: two tables, or one padded to the wider of the two.

Forward and backward passes with sparse row gradients, for 2,048 tokens and 32 experts each of 4,096; outputs and
gradients are compared before anything is timed.

    python benchmarks/unequal_widths.py [--output results/DATE-unequal.jsonl]
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import interleave, report
from torch import Tensor

from peerlm.ops import api
from peerlm.testing import relative_error

TOKENS, PER_TOKEN, EXPERTS = 2048, 32, 4096
WIDTHS = ((128, 128), (128, 512), (512, 128), (1024, 4096))


def measure(inside: int, outside: int, file: Path | None) -> None:
    """Check and time one pair of widths."""
    width = max(inside, outside)
    x = torch.randn(TOKENS, inside, requires_grad=True)
    weights = torch.rand(TOKENS, PER_TOKEN, requires_grad=True)
    ids = torch.randint(0, EXPERTS, (TOKENS, PER_TOKEN))
    down = (torch.randn(EXPERTS, inside) * inside**-0.5).requires_grad_()
    up = torch.randn(EXPERTS, outside, requires_grad=True)
    rows = torch.stack([F.pad(down, (0, width - inside)), F.pad(up, (0, width - outside))], dim=1)
    rows = rows.detach().requires_grad_()
    grad = torch.randn(TOKENS, outside)

    def two() -> Tensor:
        x.grad = weights.grad = down.grad = up.grad = None
        hidden = api.dot_values(x, ids, down, row_gradients=True)
        y = api.mix_values(weights * hidden, ids, up, row_gradients=True)
        y.backward(grad)
        return y.detach()

    def padded() -> Tensor:
        x.grad = weights.grad = rows.grad = None
        wide = F.pad(x, (0, width - inside))
        y = api.mix_experts(wide, weights, ids, rows, activation="identity", row_gradients=True)[:, :outside]
        y.backward(grad)
        return y.detach()

    y, gradients = two(), [tensor.grad.clone() for tensor in (x, weights)]
    assert relative_error(padded(), y.double()) < 1e-5
    for tensor, expected in zip((x, weights), gradients, strict=True):
        assert relative_error(tensor.grad, expected.double()) < 1e-5
    bytes_of = {"padded_bytes": rows.nbytes, "two_bytes": down.nbytes + up.nbytes}
    part = f"{inside} -> {outside}"
    report(part, interleave({"two tables": two, "one padded": padded}, rounds=7), bytes_of, file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    for inside, outside in WIDTHS:
        measure(inside, outside, arguments.output)
