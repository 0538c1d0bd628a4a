"""Forward and backward time of PEER's expert mixing on each backend, correctness first: a Markdown table.

2,048 tokens, 64 experts each, width 128, 128² experts, float32; one process, backends interleaved, medians.

    python benchmarks/backends.py
"""

# ruff: noqa: T201, a table on the terminal is what this is for

import platform
import statistics
import time

import torch
from torch import Tensor

from peerlm.ops import api
from peerlm.testing import mix_inputs

TOKENS, PER_TOKEN, DIM, NUM_EXPERTS, ROUNDS = 2048, 64, 128, 128**2, 9
BACKENDS = ("reference", "bag")


def mix(arguments: list[Tensor], ids: Tensor, backend: str) -> Tensor:
    """Expert mixing of x, weights, down and up."""
    x, weights, down, up = arguments
    return api.mix_experts(x, weights, ids, down, up, backend=backend)


def main() -> None:
    """Compare, then time."""
    inputs = mix_inputs(TOKENS, PER_TOKEN, DIM, NUM_EXPERTS)
    arguments = [
        tensor.detach().float().requires_grad_() for tensor in (inputs.x, inputs.weights, inputs.down, inputs.up)
    ]
    expected = torch.autograd.grad(mix(arguments, inputs.ids, "reference").square().sum(), arguments)
    for backend in BACKENDS:
        found = torch.autograd.grad(mix(arguments, inputs.ids, backend).square().sum(), arguments)
        for wanted, got in zip(expected, found, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())

    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(ROUNDS):
        for backend in BACKENDS:
            started = time.perf_counter()
            y = mix(arguments, inputs.ids, backend)
            forward = time.perf_counter()
            torch.autograd.grad(y.sum(), arguments)
            backward = time.perf_counter()
            seconds.setdefault((backend, "forward"), []).append(forward - started)
            seconds.setdefault((backend, "backward"), []).append(backward - forward)

    print("| backend | forward ms | backward ms |\n|---|---|---|")
    for backend in BACKENDS:
        cells = [f"{1e3 * statistics.median(seconds[backend, part]):.1f}" for part in ("forward", "backward")]
        print(f"| {backend} | {' | '.join(cells)} |")
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")


if __name__ == "__main__":
    main()
