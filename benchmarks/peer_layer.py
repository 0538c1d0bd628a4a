"""The PEER layer against other implementations: forward, training step, decoding and memory. Markdown and JSON.

Each baseline meets our layer in a process of its own, interleaved with it, because two of them do not fit into memory
together; correctness is checked first. `--tuned` gives baselines huge pages and fused Adam. See benchmarks/README.md.

    python benchmarks/peer_layer.py PEER-pytorch --num-experts 1048576 [--tuned] [--json FILE]
"""

import argparse
import os
import resource
import sys
from pathlib import Path

if "--tuned" in sys.argv:
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # read by torch when it is loaded

import torch
import torch.nn.functional as F
from measure import interleave, report
from torch import Tensor, nn

from peerlm import PEER, DenseFFW, ProductKeys
from peerlm.malloc import keep_freed_memory
from peerlm.ops import api
from peerlm.optim import RowAdamW, parameter_groups

HEADS, EXPERTS_PER_HEAD, HALF_KEY = 8, 16, 128
INDEX: dict[str, object] = {
    "heads": HEADS,
    "experts_per_head": EXPERTS_PER_HEAD,
    "key_dim": 2 * HALF_KEY,
    "shared_keys": False,
    "query_norm": "none",
}
LEARNING_RATE = 1e-3
PARTS = ("forward", "backward", "step", "decode")
MODES: dict[str, dict[str, object]] = {
    "exact": {},
    "lazy": {"lazy": True},
    "fused": {"fused": True},
    "row-wise": {"lazy": True, "row_wise": True},
}


class Contender:
    """A layer with its optimizer."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer | list[torch.optim.Optimizer] | None):
        self.module = module
        self.optimizers = optimizer if isinstance(optimizer, list) else [optimizer] if optimizer else []

    def forward(self, x: Tensor) -> Tensor:
        """Evaluation, (T, D)."""
        self.module.eval()
        with torch.no_grad():
            return self.module(x[None])[0]

    def backward(self, x: Tensor, grad: Tensor) -> None:
        """Forward and backward."""
        self.module.train()
        self.module.zero_grad(set_to_none=True)
        self.module(x[None]).backward(grad[None])

    def step(self, x: Tensor, grad: Tensor) -> None:
        """Forward, backward and update."""
        self.backward(x, grad)
        for optimizer in self.optimizers:
            optimizer.step()


def ours(dim: int, num_experts: int, *, train: bool, **options: object) -> Contender:
    """Our layer with keys per head, as baselines have them, and the exact row-sparse AdamW."""
    row_format = str(options.pop("row_format", "float32"))
    layer = PEER(
        dim,
        num_experts=num_experts,
        row_format=row_format,
        backend=str(options.pop("backend", "auto")),
        **INDEX,
    )
    return Contender(layer, RowAdamW(parameter_groups(layer), lr=LEARNING_RATE, **options) if train else None)


class EmbeddingPEER(nn.Module):
    """What one writes with torch alone: `nn.Embedding(sparse=True)` for the experts, torch's top-k for the index."""

    def __init__(self, dim: int, num_experts: int):
        super().__init__()
        self.index = ProductKeys(dim, num_experts=num_experts, backend="reference", **INDEX)
        self.down = nn.Embedding(num_experts, dim, sparse=True)
        self.up = nn.Embedding(num_experts, dim, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., dim)."""
        weights, ids = (each.flatten(-2) for each in self.index(x))
        hidden = F.gelu(torch.einsum("...d,...pd->...p", x, self.down(ids))) * weights
        return torch.einsum("...p,...pd->...d", hidden, self.up(ids))


def baseline(name: str, dim: int, num_experts: int, *, tuned: bool, train: bool) -> Contender:
    """The other implementation and the optimizer that it is used with."""
    if name == "PEER-pytorch":
        from PEER_pytorch import PEER as PeerPytorch  # noqa: N811

        layer = PeerPytorch(
            dim,
            heads=HEADS,
            num_experts=num_experts,
            num_experts_per_head=EXPERTS_PER_HEAD,
            dim_key=HALF_KEY,
            non_competing_scores=False,
        )
        return Contender(layer, torch.optim.Adam(layer.parameters(), lr=LEARNING_RATE, fused=tuned) if train else None)
    if name == "SparseAdam":
        module = EmbeddingPEER(dim, num_experts)
        if not train:
            return Contender(module, None)
        tables = [module.down.weight, module.up.weight]
        return Contender(
            module,
            [
                torch.optim.SparseAdam(tables, lr=LEARNING_RATE),
                torch.optim.Adam(module.index.parameters(), lr=LEARNING_RATE, fused=tuned),
            ],
        )
    if name in MODES:
        return ours(dim, num_experts, train=train, **MODES[name])
    if name == "reference":
        return ours(dim, num_experts, train=False, backend="reference")
    if name == "compiled reference":
        contender = ours(dim, num_experts, train=False, backend="reference")
        contender.module.compile()
        return contender
    if name == "bag":
        return ours(dim, num_experts, train=False, backend="bag")
    hidden = {"dense, equal active": HEADS * EXPERTS_PER_HEAD, "dense, 4 d": 4 * dim}[name]
    layer = DenseFFW(dim, hidden=hidden)
    return Contender(layer, torch.optim.AdamW(layer.parameters(), lr=LEARNING_RATE, fused=True) if train else None)


DENSE = ("dense, equal active", "dense, 4 d")
BASELINES = ("PEER-pytorch", "SparseAdam", "reference", "compiled reference", "bag", *DENSE, *MODES, "none")


NEAR_TIE = 1e-5
"""Scores of a last expert retrieved and the next that float32 may order either way; scores are about 1."""


def check(mine: Contender, other: Contender, x: Tensor) -> None:
    """Give both the same weights where they are the same layer, and compare outputs, but of tokens with a near tie."""
    layer = mine.module
    with torch.no_grad():
        if hasattr(other.module, "weight_down_embed"):
            other.module.weight_down_embed.weight.copy_(layer.experts.down)
            other.module.weight_up_embed.weight.copy_(layer.experts.up)
            other.module.keys.copy_(layer.product_keys.sub_keys.permute(1, 2, 0, 3))
            query = layer.product_keys.query_proj.weight.view(HEADS, 2, HALF_KEY, -1).transpose(0, 1)
            other.module.to_queries[0].weight.copy_(query.reshape(2 * HEADS * HALF_KEY, -1))
        elif isinstance(other.module, EmbeddingPEER):
            other.module.index.load_state_dict(layer.product_keys.state_dict())
            other.module.down.weight.copy_(layer.experts.down)
            other.module.up.weight.copy_(layer.experts.up)
        elif isinstance(other.module, PEER):
            other.module.load_state_dict(layer.state_dict())
        else:
            return
    keys = layer.product_keys
    with torch.no_grad():
        wide = keys.query(x).double(), keys.sub_keys.double()
        scores, _ = api.retrieve(*wide, keys.experts_per_head + 1, weighting="none", backend="reference")
    clear = (scores[..., -2] - scores[..., -1] > NEAR_TIE).all(dim=-1)
    assert clear.float().mean() > 0.9, "nearly all tokens tie: nothing would be compared"
    torch.testing.assert_close(mine.forward(x)[clear], other.forward(x)[clear], rtol=1e-4, atol=1e-5)


def peak_gib() -> float:
    """Most memory that this process has used."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Parse, check, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("baseline", choices=BASELINES)
    parser.add_argument("--tuned", action="store_true", help="huge pages and fused Adam for the baseline")
    parser.add_argument("--keep-freed-memory", action="store_true", help="of both, as peerlm's commands do")
    parser.add_argument("--num-experts", type=int, default=1024**2)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--memory", action="store_true", help="train the baseline alone ('none': ours) and print its peak"
    )
    parser.add_argument("--mode", choices=MODES, default="exact", help="our optimizer")
    parser.add_argument("--row-format", default="float32")
    parser.add_argument("--json", type=Path, help="file that a row for each figure is added to")
    options = parser.parse_args()
    if options.keep_freed_memory and not keep_freed_memory():
        parser.error("this system has no such setting, or malloc's environment variables are set")
    torch.manual_seed(0)
    trains = "step" in options.parts or "backward" in options.parts or options.memory
    dim, num_experts = options.dim, options.num_experts
    mode = MODES[options.mode]
    if options.row_format != "float32" and options.mode == "exact":
        mode = {"lazy": True}
    sizes = {key: getattr(options, key) for key in ("num_experts", "dim", "tokens")}
    sizes |= {"our_mode": options.mode, "our_row_format": options.row_format}
    sizes["freed_memory_kept"] = options.keep_freed_memory
    contenders = {}
    if options.baseline == "none" or not options.memory:
        contenders["peerlm"] = ours(dim, num_experts, train=trains, row_format=options.row_format, **mode)
    if options.baseline != "none":
        name = f"peerlm, {options.baseline}" if options.baseline in MODES else options.baseline
        name += ", tuned" if options.tuned else ""
        contenders[name] = baseline(options.baseline, dim, num_experts, tuned=options.tuned, train=trains)
    if options.memory:
        (contender,) = contenders.values()
        for _ in range(3):
            contender.step(torch.randn(options.tokens, dim), torch.randn(options.tokens, dim))
        report("peak GiB", {next(iter(contenders)): [peak_gib()]}, sizes, options.json)
        return
    if options.baseline != "none" and options.row_format == "float32":
        check(*contenders.values(), torch.randn(64, dim))
    inputs = {"forward": options.tokens, "decode": 1}
    for part in options.parts:
        if part in ("step", "backward"):
            trained = {name: getattr(contender, part) for name, contender in contenders.items() if contender.optimizers}
            grad = torch.randn(options.tokens, dim)
            times = interleave(
                {
                    name: lambda run=run, grad=grad: run(torch.randn(options.tokens, dim), grad)
                    for name, run in trained.items()
                },
                rounds=min(options.rounds, 5),
            )
        else:
            rounds = options.rounds if part == "forward" else 20 * options.rounds
            times = interleave(
                {
                    name: lambda contender=contender, part=part: contender.forward(torch.randn(inputs[part], dim))
                    for name, contender in contenders.items()
                },
                rounds=rounds,
            )
        tokens = inputs.get(part, options.tokens)
        report(f"{part} ms", times, {**sizes, "tokens": tokens}, options.json)


if __name__ == "__main__":
    main()
