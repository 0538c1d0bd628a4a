"""Train a language model with a very large layer for some steps: loss, time per step, peak memory. One line of JSON.

python benchmarks/large_table.py [recipes/large.toml] [--set model.peer.num_experts=1048576]
"""

# ruff: noqa: T201, a line on the terminal is what this is for

import argparse
import json
import statistics
import time

import torch

from peerlm.data import batches
from peerlm.ranks import join_ranks
from peerlm.train import load_recipe
from peerlm.train.checkpoint import TrainState
from peerlm.train.trainer import Trainer, peak_memory_bytes


def main() -> None:
    """Build, train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="recipes/large.toml")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    options = parser.parse_args()
    config = load_recipe(options.recipe, options.overrides)
    started = time.perf_counter()
    with join_ranks(config.device) as ranks:
        trainer = Trainer(config, ranks, progress=False)
        print(f"built in {time.perf_counter() - started:.0f} s", flush=True)
        stream = batches(trainer.windows, batch_size=config.data.batch_size, seed=config.seed, position=0)
        state, losses, seconds = TrainState(), [], []
        for step in range(config.budget.steps):
            before = time.perf_counter()
            total = state.interval_loss
            state, _ = trainer.step(state, stream, sample_usage=False)
            seconds.append(time.perf_counter() - before)
            losses.append(float(state.interval_loss - total))
            if step % 20 == 19:
                print(f"step {step + 1}: loss {statistics.mean(losses[-20:]):.3f}, {seconds[-1]:.2f} s", flush=True)
    print(
        json.dumps(
            {
                "num_experts": config.model["peer"]["num_experts"],
                "row_format": config.model["peer"].get("row_format", "float32"),
                "parameters": trainer.cost.total_parameters,
                "steps": len(losses),
                "loss of the first 20": round(statistics.mean(losses[:20]), 4),
                "loss of the last 20": round(statistics.mean(losses[-20:]), 4),
                "median step s": round(statistics.median(seconds), 4),
                "peak GiB": round(peak_memory_bytes(ranks.device) / 2**30, 2),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
