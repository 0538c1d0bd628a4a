"""Retrieved adapters against LoRA: perplexity on a new domain after equal FLOPs from the same frozen model.

python -m peerlm_studies.adapters runs/base code.txt.xz code_heldout.txt prose_heldout.txt
"""

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from peerlm.accounting import model_cost
from peerlm.adapters.config import PeerAdapterConfig
from peerlm.errors import UserError
from peerlm.evaluate.encoding import encode
from peerlm.evaluate.files import read_documents
from peerlm.evaluate.loading import load_model, trained_context
from peerlm.evaluate.perplexity import score_text
from peerlm.evaluate.windows import begin_windows
from peerlm.marks import marks_of
from peerlm.optim import RowAdamW, clip_gradients, parameter_groups, set_learning_rates, wsd
from peerlm.train.step import accumulate_gradients
from peerlm_studies.rows import append_row, read_rows
from peerlm_studies.script import run_script

POOL: dict[str, Any] = {
    "target_modules": ["ffw"],
    "heads": 4,
    "experts_per_head": 8,
    "key_dim": 16,
    "weight_scale": 8.0,
}
LORA: dict[str, Any] = {"target_modules": ["down_proj", "up_proj"]}
# Of a model of width 128 with dense layers of 512 neurons: a pool of 256 experts has per block as many parameters as a
# LoRA of rank 59 beside both matrices, and a token uses as many as one of rank 14; larger pools use hardly more.
METHODS: dict[str, Callable[[], PeftConfig]] = {
    "pool of 256": lambda: PeerAdapterConfig(num_experts=256, **POOL),
    "pool of 1,024": lambda: PeerAdapterConfig(num_experts=1024, **POOL),
    "pool of 4,096": lambda: PeerAdapterConfig(num_experts=4096, **POOL),
    "LoRA, rank 14": lambda: LoraConfig(r=14, lora_alpha=14, **LORA),
    "LoRA, rank 59": lambda: LoraConfig(r=59, lora_alpha=59, **LORA),
}


def compare_adapters(
    run: Path,
    train_file: Path,
    eval_files: Sequence[Path],
    output: Path,
    *,
    flops: float,
    learning_rates: Sequence[float],
    seeds: Sequence[int] = (0,),
    limit: int = 30_000,
    report: Callable[[str], object] = lambda line: None,
) -> list[dict[str, Any]]:
    """Adapt the model of a run to a text by every method and learning rate; rows that `output` has are not made again.

    Windows of the text come in order, the same ones for every method, until the FLOPs are spent. A token takes 2
    forward passes' worth for the frozen model, whose weights need no gradients, and 3 for the adapter.

    Args:
        run: a run or a saved model with dense layers named `ffw`.
        train_file: text of the new domain.
        eval_files: texts whose perplexity is measured, the new domain's first.
        output: JSON lines.
        flops: of each training.
        learning_rates: peaks, after a twentieth of the steps; the rate falls over the last fifth.
        seeds: of the adapters' initialisation.
        limit: tokens of each evaluation file.
        report: called with a line for each row.

    Returns:
        The rows.

    Raises:
        UserError: the text is too short.
    """
    base, tokenizer = load_model(run)
    context = trained_context(run) or base.config.max_position_embeddings
    settings = {"flops": flops, "limit": limit, "train_file": train_file.name, "run": run.name}
    documents = {file.name: list(read_documents(file, ())) for file in eval_files}
    rows = [row for row in read_rows(output) if all(row.get(name) == value for name, value in settings.items())]
    done = {(row["method"], row["learning_rate"], row["seed"]) for row in rows}
    wanted = [("none", 0.0, 0)] + [(m, rate, seed) for m in METHODS for rate in learning_rates for seed in seeds]
    tokens = None
    for method, rate, seed in wanted:
        if (method, rate, seed) in done:
            continue
        row: dict[str, Any] = {"method": method, "learning_rate": rate, "seed": seed, **settings}
        model: Any = copy.deepcopy(base)
        if method != "none":
            torch.manual_seed(seed)
            model = get_peft_model(model, METHODS[method]())
            if tokens is None:
                tokens = _tokens(tokenizer, train_file, flops, base, context)
            row |= _train(model, base, tokens, context, flops=flops, learning_rate=rate)
        row["perplexity"] = {
            name: score_text(model, tokenizer, texts, context=context, limit=limit).perplexity
            for name, texts in documents.items()
        }
        append_row(output, row)
        rows.append(row)
        report(f"{method}, learning rate {rate:g}, seed {seed}: {row['perplexity']}")
    return rows


def _tokens(
    tokenizer: PreTrainedTokenizerFast, file: Path, flops: float, base: PreTrainedModel, context: int
) -> Tensor:
    """As many tokens as the cheapest adapter could be trained on."""
    needed = int(flops / (2 * model_cost(base, context).forward_flops_per_token)) + context
    marks = marks_of(base, tokenizer)
    found = encode(tokenizer, read_documents(file, ()), marks, limit=needed).tokens
    found = begin_windows(found, context, marks.window_start)
    if len(found) < needed:
        raise UserError(f"{file} has {len(found)} tokens, fewer than the {needed} of {flops:g} FLOPs; take fewer")
    return found


def _train(
    model: Any, base: nn.Module, tokens: Tensor, context: int, *, flops: float, learning_rate: float
) -> dict[str, Any]:
    """Train the adapter of `model` on windows in order, 4 a step; what it cost."""
    whole, plain = model_cost(model, context), model_cost(base, context)
    adapter_flops = whole.forward_flops_per_token - plain.forward_flops_per_token
    flops_per_token = 2 * plain.forward_flops_per_token + 3 * adapter_flops
    steps = int(flops / flops_per_token / (4 * context))
    groups = parameter_groups(model)
    optimizer = RowAdamW(groups, lr=learning_rate, weight_decay=0.0)
    model.train()
    started = time.perf_counter()
    for step in range(steps):
        batch = tokens[4 * context * step : 4 * context * (step + 1)].view(4, context)
        progress = step / steps
        rate = learning_rate * wsd(progress, warmup=0.05, decay=0.2, final=0.0)
        set_learning_rates(optimizer.param_groups, rate, progress=progress)
        accumulate_gradients(model, batch, micro_batch_size=4)
        clip_gradients(optimizer.param_groups, max_norm=1.0, table_max_norm=1.0)
        optimizer.step()
    model.eval()
    return {
        "trainable_parameters": whole.total_parameters - plain.total_parameters,
        "active_parameters": whole.active_parameters - plain.active_parameters,
        "flops_per_token": flops_per_token,
        "tokens": 4 * context * steps,
        "seconds": time.perf_counter() - started,
    }


def main(
    run: Annotated[Path, typer.Argument(help="Run or saved model whose layers are dense and named ffw.")],
    train_file: Annotated[Path, typer.Argument(help="Text of the new domain.")],
    eval_files: Annotated[list[Path], typer.Argument(help="Texts to measure, the new domain's first.")],
    output: Annotated[Path, typer.Option(help="Rows, JSON lines.")] = Path("results/adapters.jsonl"),
    flops: Annotated[float, typer.Option(help="Of each training.")] = 1e12,
    rates: Annotated[str, typer.Option(help="Learning rates, with commas.")] = "3e-3,1e-2,3e-2",
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, ...")] = 1,
) -> None:
    """Train every adapter at every learning rate, and write rows."""
    compare_adapters(
        run,
        train_file,
        eval_files,
        output,
        flops=flops,
        learning_rates=[float(rate) for rate in rates.split(",")],
        seeds=range(seeds),
        report=typer.echo,
    )


if __name__ == "__main__":
    run_script(main)
