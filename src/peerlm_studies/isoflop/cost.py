"""What the models of an isoFLOP recipe cost to run: activation memory and seconds per token, in training and inference.

python -m peerlm_studies.isoflop.cost recipes/isoflop.toml results/cost.jsonl --size d96
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from peerlm.accounting import model_cost
from peerlm.errors import UserError
from peerlm.optim import clip_gradients
from peerlm.ranks import Ranks
from peerlm.train.build import build_optimizer, new_model, train_scaled_rows
from peerlm.train.config import TrainConfig
from peerlm.train.step import accumulate_gradients, autocast
from peerlm_studies.isoflop.plan import load_isoflop
from peerlm_studies.rows import append_row, machine_and_date, read_rows
from peerlm_studies.script import run_script

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
WARM_UP = 3


def measure_costs(
    recipe: str | Path,
    output: Path,
    *,
    settings: Sequence[str] = (),
    batch_sizes: Sequence[int] = BATCH_SIZES,
    sizes: Sequence[str] = (),
    rounds: int = 5,
    report: Callable[[str], object] = lambda line: None,
) -> list[dict[str, Any]]:
    """Run new models of a recipe's methods and sizes on drawn tokens; rows that `output` has are not measured again.

    Tokens are as frequent as words are (`draw_tokens`), since frequent ones meet in the same experts. Seconds are
    medians over rounds of the process's seconds on its processor, divided by its threads. In training they are of
    forward and backward pass, clipping and optimizer, on other tokens in every round; prefill is one forward pass,
    decoding one more token of every window after half a context.

    Args:
        recipe: an isoFLOP recipe.
        output: JSON lines.
        settings: changes to the recipe; the text that runs were made on is part of their keys.
        batch_sizes: windows at a time.
        sizes: only these; empty: all that are trained at some budget.
        rounds: of each timing, after `WARM_UP` that do not count.
        report: called with a line for each row.

    Returns:
        The rows of this recipe's runs: method, size, batch_size, parameters, FLOPs, `activation_bytes` kept between
        forward and backward pass, and `train_seconds`, `prefill_seconds` and `decode_seconds` per token. Their key is
        that of the run of this method and size with the fewest FLOPs.

    Raises:
        UserError: a run is compiled or checkpoints gradients, which is not measured here.
    """
    plan = load_isoflop(recipe, settings)
    rows = read_rows(output)
    done = {(row["key"], row["batch_size"], row["threads"]) for row in rows}
    runs = {(run.method, run.size): run for run in reversed(plan.runs(plan.compare.seeds[:1], sizes=sizes, whole=True))}
    for run in runs.values():
        for name in ("compile", "gradient_checkpointing"):
            if getattr(run.planned.train, name):
                raise UserError(f"{run.planned.label} has {name} = true, which is not measured here: set it to false")
    keys = {model: run.planned.key(plan.compare) for model, run in runs.items()}
    for (method, size), run in reversed(runs.items()):
        for batch_size in batch_sizes:
            if (keys[method, size], batch_size, torch.get_num_threads()) in done:
                continue
            row = {
                "key": keys[method, size],
                "method": method,
                "size": size,
                **_measure(run.planned.train, batch_size, rounds),
                **machine_and_date(),
            }
            append_row(output, row)
            rows.append(row)
            report(f"{method}, {size}, {batch_size} windows: {1e6 * row['train_seconds']:.1f} us per token")
    return [row for row in rows if row["key"] in keys.values()]


def _measure(train: TrainConfig, batch_size: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(train.seed)
    model = new_model(train, vocab_size=train.data.vocab_size)
    context = train.data.context
    tokens_BT = draw_tokens(batch_size, context, train.data.vocab_size)
    ranks = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
    train_scaled_rows(model)
    optimizer = build_optimizer(model, train, ranks)
    precision = partial(autocast, train.precision, "cpu")

    def step() -> None:
        batch_BT = draw_tokens(batch_size, context, train.data.vocab_size)
        accumulate_gradients(model, batch_BT, micro_batch_size=batch_size, autocast=precision)
        clip_gradients(optimizer.param_groups, max_norm=train.optim.clip, table_max_norm=train.optim.table_clip)
        optimizer.step()

    model.train()
    cost = model_cost(model, context)
    with precision():
        kept = activation_bytes(model, tokens_BT)
    row = {
        "batch_size": batch_size,
        "total_parameters": cost.total_parameters,
        "active_parameters": cost.active_parameters,
        "forward_flops_per_token": cost.forward_flops_per_token,
        "activation_bytes": kept,
        "train_seconds": seconds(step, rounds) / tokens_BT.numel(),
    }
    model.eval()
    with torch.no_grad(), precision():
        half = context // 2
        cache = model(tokens_BT[:, :half], use_cache=True).past_key_values
        prefill = seconds(lambda: model(tokens_BT, use_cache=False), rounds)

        def decode() -> None:
            model(tokens_BT[:, half : half + 1], past_key_values=cache, use_cache=True)
            cache.crop(-1)

        decoding = seconds(decode, rounds)
    return {
        **row,
        "prefill_seconds": prefill / tokens_BT.numel(),
        "decode_seconds": decoding / batch_size,
        "threads": torch.get_num_threads(),
    }


def draw_tokens(batch_size: int, context: int, vocab_size: int) -> Tensor:
    """Token ids (batch_size, context) of which the r-th is drawn 1/r times as often as the first, by Zipf's law."""
    shares_V = 1 / torch.arange(1, vocab_size + 1)
    return torch.multinomial(shares_V, batch_size * context, replacement=True).view(batch_size, context)


def activation_bytes(model: nn.Module, tokens_BT: Tensor) -> int:
    """Bytes that a forward pass in training keeps for the backward pass, each storage once, parameters not."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss
    del loss
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in own)


def seconds(work: Callable[[], object], rounds: int) -> float:
    """Median seconds of the process on its processor, over threads; the first rounds, `WARM_UP` more, do not count.

    In them memory is new, among it the moments of rows that a step is the first to retrieve.
    """
    times = []
    for _ in range(WARM_UP + rounds):
        started = time.process_time()
        work()
        times.append((time.process_time() - started) / torch.get_num_threads())
    return statistics.median(times[WARM_UP:])


def main(
    recipe: Path,
    output: Path,
    size: Annotated[list[str], typer.Option(help="Only this size; repeatable.")] = [],  # noqa: B006
    batch_size: Annotated[list[int], typer.Option(help="Windows at a time; repeatable.")] = list(BATCH_SIZES),  # noqa: B006
    settings: Annotated[list[str], typer.Option("--set", help="Change a key of the recipe; repeatable.")] = [],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=1, help="Of each timing, of which the median counts.")] = 5,
) -> None:
    """Measure what the models of a recipe cost to run."""
    measure_costs(
        recipe, output, settings=settings, sizes=size, batch_sizes=batch_size, rounds=rounds, report=typer.echo
    )


if __name__ == "__main__":
    run_script(main)
