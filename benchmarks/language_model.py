"""A small language model with PEER against one with dense layers of equal FLOPs: a training step, and decoding.

Width 256, 2,048 tokens a step, 1,048,576 experts a table: PEER in the inner two blocks of four, and dense layers there
whose neurons cost as many FLOPs. Steps of both are run in turn; so is decoding of one sequence with a cache.
The machine has to be idle. Markdown and JSON.

    python benchmarks/language_model.py [--experts-per-head 16] [--row-format int8] [--kv-shift] [--json FILE]

Rows of tables have one second moment a row and no first, and are updated in the backward pass. With --tables exact they
have both moments of every weight and all gradients are clipped, as presets train; dense layers are clipped then, too.
With --kv-shift both are measured with shifted keys and values too.
"""

# ruff: noqa: T201, tables on the terminal are what this is for

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import interleave, report
from torch import nn
from transformers import PreTrainedModel

from peerlm import PEER, DenseFFW, PeerConfig, PeerForCausalLM
from peerlm.layers import Table
from peerlm.malloc import keep_freed_memory
from peerlm.optim import RowAdamW, clip_gradients, parameter_groups

VOCABULARY, CONTEXT, WINDOWS, BLOCKS = 4096, 256, 8, 4


def peer_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The layer that is measured: the one head of small keys of the preset, and as many experts as asked for."""
    return {
        "num_experts": arguments.num_experts,
        "heads": 1,
        "experts_per_head": arguments.experts_per_head,
        "key_dim": 32,
        "shared_keys": False,
        "key_norm": True,
        "activation": "one_plus",
        "weight_scale": 256.0,
        "row_format": arguments.row_format,
    }


def neurons_of_equal_flops(dim: int, settings: dict[str, Any]) -> int:
    """Hidden neurons of a dense layer that costs a token as many FLOPs as PEER with these settings."""
    keys = 2 * math.isqrt(settings["num_experts"]) * settings["key_dim"] // 2
    multiplications = dim * settings["key_dim"] + keys + 2 * dim * settings["experts_per_head"]
    return round(multiplications / (2 * dim))


def model_of(
    dim: int, inner: Callable[[], nn.Module], peer: dict[str, Any], *, kv_shift: bool = False
) -> PeerForCausalLM:
    """A language model whose inner blocks have these layers."""
    config = PeerConfig(
        vocab_size=VOCABULARY,
        hidden_size=dim,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        ffw_layers=["dense"] * BLOCKS,
        peer=peer,
        kv_shift=kv_shift,
    )
    model = PeerForCausalLM(config)
    for block in model.model.layers[1:-1]:
        block.ffw = inner()
    return model


class Trained:
    """A model and its optimizer."""

    def __init__(self, model: PeerForCausalLM, *, by_rows: bool, tables: str = "fused"):
        self.model, self.clipped = model, tables == "exact"
        for table in (module for module in model.modules() if isinstance(module, Table)):
            if table.scales is not None:
                table.train_in_place()
        groups = parameter_groups(model)
        options: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.98)}
        if by_rows and tables == "fused":
            for group in groups:
                if group["name"] == "table":
                    group.update(betas=(0.0, 0.98), row_wise=True)
        self.optimizer: torch.optim.Optimizer = (
            RowAdamW(groups, fused=tables == "fused", weight_decay=0.0, **options)
            if by_rows
            else torch.optim.AdamW(groups, fused=True, **options)
        )

    def step(self) -> None:
        """Forward, backward and update on random tokens."""
        ids = torch.randint(VOCABULARY, (WINDOWS, CONTEXT))
        self.model.train()
        self.model(ids, labels=ids).loss.backward()
        if self.clipped:
            clip_gradients(self.optimizer.param_groups, max_norm=1.0, table_max_norm=1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


@torch.no_grad()
def decoding(model: PreTrainedModel, tokens: int) -> Callable[[], None]:
    """What generates some tokens after a prompt of 32, by one sequence."""
    model.eval()
    prompt = torch.randint(model.config.vocab_size, (1, 32))

    def decode() -> None:
        with torch.no_grad():
            model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)

    return decode


@torch.no_grad()
def layer_alone(layer: nn.Module, dim: int, count: int, tokens: int = 1) -> Callable[[], None]:
    """What passes single tokens, or so many together, through a layer, one after another."""
    layer.eval()
    inputs = [torch.randn(1, tokens, dim) for _ in range(count)]

    def run() -> None:
        with torch.no_grad():
            for x in inputs:
                layer(x)

    return run


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--num-experts", type=int, default=1024**2)
    parser.add_argument("--experts-per-head", type=int, default=16)
    parser.add_argument("--row-format", default="float32")
    parser.add_argument("--tables", choices=["fused", "exact"], default="fused")
    parser.add_argument("--kv-shift", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    dim, settings = arguments.dim, peer_settings(arguments)
    hidden = neurons_of_equal_flops(dim, settings)
    models = {}
    for shift in (False, True) if arguments.kv_shift else (False,):
        name = ", shifted" if shift else ""
        models[f"dense{name}"] = model_of(dim, lambda: DenseFFW(dim, hidden=hidden), {}, kv_shift=shift)
        models[f"PEER{name}"] = model_of(dim, lambda: PEER(dim, **settings), settings, kv_shift=shift)
    sizes = {"dim": dim, **settings, "dense_neurons": hidden, "tables": arguments.tables}

    def measure(part: str, cases: dict[str, Callable[[], object]]) -> None:
        report(part, interleave(cases, rounds=arguments.rounds), sizes, arguments.json)

    print(f"dense layers of {hidden} neurons; {torch.get_num_threads()} threads")
    print("| part | contender | median ms | range | ratio |\n|---|---|---|---|---|")
    # Before there are optimizers, which watch their tables, as no model has that was loaded to be used
    layers = {name: models[name].model.layers[1].ffw for name in ("dense", "PEER")}
    measure(
        "1,000 tokens, one by one, the layer alone", {n: layer_alone(each, dim, 1000) for n, each in layers.items()}
    )
    measure(
        "100 prompts of 32 tokens, the layer alone", {n: layer_alone(each, dim, 100, 32) for n, each in layers.items()}
    )
    measure("64 tokens decoded", {name: decoding(model, 64) for name, model in models.items()})
    trained = {
        name: Trained(model, by_rows=name.startswith("PEER"), tables=arguments.tables) for name, model in models.items()
    }
    measure("training step", {name: each.step for name, each in trained.items()})


if __name__ == "__main__":
    main()
