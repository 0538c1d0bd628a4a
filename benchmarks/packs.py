"""A PEER layer with packs loaded: time at decode and for many tokens, the packs' memory, and the search checked first.

Packs are random, as are the layers, so that an expert of a pack is retrieved as often as any other.

    python benchmarks/packs.py [--num-experts 16384 1048576] [--packs 0 1 10] [--pack-experts 1024] [--json FILE]
"""

# ruff: noqa: T201, tables on the terminal are what this is for

import argparse
from pathlib import Path

import torch
from measure import interleave, report

from peerlm import PEER
from peerlm.packs.api import loaded_packs, new_pack, pack_parameters
from peerlm.testing import exhaustive_search


def with_packs(dim: int, num_experts: int, packs: int, pack_experts: int) -> PEER:
    """A layer of the default settings in evaluation mode; all layers of a size have the same experts."""
    torch.manual_seed(0)
    layer = PEER(dim, num_experts=num_experts).eval().requires_grad_(False)
    for number in range(packs):
        new_pack(layer, f"pack-{number}", pack_experts, seed=number)
        for parameter in pack_parameters(layer, f"pack-{number}"):
            parameter.requires_grad_(False)
        pack_parameters(layer, f"pack-{number}")[1][:, 1].normal_(std=0.1)
    return layer


def check(layer: PEER, tokens: int) -> None:
    """Raise an AssertionError unless the experts are those of an exhaustive float64 search of the union."""
    index, x = layer.product_keys, torch.randn(tokens, layer.dim)
    _, found = layer.packs(x, None, index)
    query = index.query(x)
    parts = [(index.sub_keys, index.pairing), *((p.sub_keys, "shells") for p in layer.packs.by_name().values())]
    scores = []
    for keys, pairing in parts:
        ids, ordered = exhaustive_search(query, keys, keys.shape[2] ** 2, pairing)
        scores.append(torch.empty_like(ordered).scatter_(-1, ids, ordered))
    best = torch.cat(scores, dim=-1).argsort(dim=-1, descending=True, stable=True)[..., : index.experts_per_head]
    assert torch.equal(found, best)
    share = (found >= index.num_experts).double().mean().item()
    print(f"exact for {tokens} tokens; {share:.1%} of what is retrieved is of packs")


def main() -> None:
    """Check, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--num-experts", type=int, nargs="+", default=[128**2, 1024**2])
    parser.add_argument("--packs", type=int, nargs="+", default=[0, 1, 10])
    parser.add_argument("--pack-experts", type=int, default=32**2)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file that a row for each figure is added to")
    options = parser.parse_args()
    for num_experts in options.num_experts:
        layers = {
            f"{packs} packs": with_packs(options.dim, num_experts, packs, options.pack_experts)
            for packs in options.packs
        }
        sizes = {"num_experts": num_experts, "dim": options.dim, "pack_experts": options.pack_experts}
        with torch.no_grad():
            for name, layer in layers.items():
                if loaded_packs(layer):
                    check(layer, 2 if num_experts > 2**17 else 32)
                    size = sum(p.nbytes for each in loaded_packs(layer) for p in pack_parameters(layer, each))
                    report("memory MiB", {name: [size / 2**20]}, sizes, options.json)
            for part, tokens, rounds in (
                ("decode ms", 1, 40 * options.rounds),
                ("forward ms", options.tokens, options.rounds),
            ):
                times = interleave(
                    {
                        name: lambda layer=layer, tokens=tokens: layer(torch.randn(1, tokens, options.dim))
                        for name, layer in layers.items()
                    },
                    rounds=rounds,
                )
                report(part, times, {**sizes, "tokens": tokens}, options.json)


if __name__ == "__main__":
    main()
