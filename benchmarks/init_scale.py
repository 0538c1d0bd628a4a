"""The output scale of each layer before training, as a share of the dense GELU layer: a Markdown table.

Inputs are standard normal, as after RMSNorm. The largest layer needs 9 GB of memory.

    python benchmarks/init_scale.py                 # all layers
    python benchmarks/init_scale.py row_dim beside  # those whose names contain one of these
"""

# ruff: noqa: T201, a table on the terminal is what this is for

import platform
import sys
from collections.abc import Callable

import torch
from torch import nn

from peerlm import PEER, DenseFFW, ExpertChoiceMoE, ProductKeyMemory, TokenChoiceMoE
from peerlm.layers import ParallelFFW

DIMS = (128, 512, 1024)
TOKENS = 512
LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "dense, GELU": lambda dim: DenseFFW(dim),
    "dense, SwiGLU": lambda dim: DenseFFW(dim, activation="silu", gated=True),
    "expert choice": lambda dim: ExpertChoiceMoE(dim),
    "token choice": lambda dim: TokenChoiceMoE(dim),
    "PKM, N = 128²": lambda dim: ProductKeyMemory(dim, num_values=128**2),
    "PKM, N = 1024²": lambda dim: ProductKeyMemory(dim, num_values=1024**2),
    "PEER, N = 128²": lambda dim: PEER(dim, num_experts=128**2),
    "PEER, N = 1024²": lambda dim: PEER(dim, num_experts=1024**2),
    "PEER, N = 128², gated": lambda dim: PEER(dim, num_experts=128**2, gated=True),
    "PEER, N = 128², sigmoid": lambda dim: PEER(dim, num_experts=128**2, weighting="sigmoid"),
    "PEER, N = 128², raw scores": lambda dim: PEER(dim, num_experts=128**2, weighting="none"),
    "PEER, N = 128², row_dim = d / 4": lambda dim: PEER(dim, num_experts=128**2, row_dim=dim // 4),
    "PEER, N = 128², beside dense": lambda dim: ParallelFFW(
        {"peer": PEER(dim, num_experts=128**2), "dense": DenseFFW(dim, hidden=dim)}
    ),
}


@torch.no_grad()
def output_rms(layer: nn.Module, dim: int) -> float:
    """Root mean square of the layer's output over `TOKENS` standard normal inputs."""
    return layer(torch.randn(TOKENS, dim)).square().mean().sqrt().item()


def main() -> None:
    """Print the table, a row per layer and a column per width."""
    torch.manual_seed(0)
    dense = {dim: output_rms(DenseFFW(dim), dim) for dim in DIMS}
    print(f"Root mean square of the output over that of a dense GELU layer; {TOKENS} tokens,")
    print(f"torch {torch.__version__}, {platform.machine()}.\n")
    print("| layer | " + " | ".join(f"d = {dim}" for dim in DIMS) + " |")
    print("|---|" + "---|" * len(DIMS))
    named = sys.argv[1:] or [""]
    for name, build in LAYERS.items():
        if not any(part in name for part in named):
            continue
        ratios = (output_rms(build(dim), dim) / dense[dim] for dim in DIMS)
        print(f"| {name} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |", flush=True)


if __name__ == "__main__":
    main()
