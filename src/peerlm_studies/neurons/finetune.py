"""Finetuning at equal FLOPs: a dense model's neurons under a learned index, against the same layers at random."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TaskID
from torch import nn

from peerlm.accounting import Cost, model_cost
from peerlm.convert.insertion import FFWSite, put_in_place
from peerlm.convert.neurons.layer import NeuronLayer, neuron_layer
from peerlm.errors import TrainingStopped, UserError
from peerlm.evaluate import held_out_loss
from peerlm.evaluate.likelihood import device_of
from peerlm.evaluate.progress import progress_bar
from peerlm.model.modeling_peer import PeerDecoderLayer
from peerlm.optim import clip_gradients, cosine, parameter_groups, set_learning_rates
from peerlm.train.step import accumulate_gradients
from peerlm_studies.neurons.setup import (
    WINDOWS_PER_PASS,
    NeuronSetup,
    draw_windows,
    fitted_layers,
    key_of,
    layer_inputs,
    load_setup,
    replaced,
)
from peerlm_studies.rows import append_row, provenance, read_rows

STARTS = ("neurons", "random", "dense")
WEIGHT_DECAY = 0.01
WARMUP, FINAL = 0.05, 0.1
"""Shares of the run, and of the peak learning rate, as the training recipes have them."""


def finetune_neurons(
    run: str | Path,
    output: Path,
    *,
    share: float,
    flops: Sequence[float] = (0.0, 1e12, 1e13),
    learning_rates: Sequence[float] = (1e-3,),
    starts: Sequence[str] = STARTS,
    text: Sequence[str | Path] = (),
    data: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    fit_tokens: int = 65536,
    fit_steps: int = 300,
    windows: int = 128,
    context: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Train the whole model on for some FLOPs from each start, and measure its perplexity on held-out windows.

    Starts: "neurons", all dense layers as retrieved neurons under learned indices; "random", the same layers with
    random indices and neurons, the rest of the model as it was; "dense", the model itself. Random neurons have the
    output scale that a new model of our own has at that layer, and 1 in a model of another kind. Each budget is a run
    of its own with a schedule of its own: AdamW (0.9, 0.98), weight decay 0.01, 5% warmup, cosine to 10%, clip 1, 8
    windows a step, which all starts see in the same order.

    Each run is a row of OUTPUT/finetune.jsonl and is not made again.

    Args:
        share: share of the neurons that a token retrieves.
        flops: budgets, in training FLOPs as `peerlm.accounting` counts them; learning the indices is not in them.
        learning_rates: peaks to try; with 0 FLOPs there is one row for all.
        starts: which of `STARTS`.
        run, output, text, data, settings, fit_tokens, fit_steps, windows, context, seed, progress: as
            `measure_neurons`.

    Returns:
        The rows, in the order of starts, budgets and rates.

    Raises:
        UserError: as `load_setup`, an unknown start, or a budget that is less than one step; before any training.
        TrainingStopped: the loss or a gradient was not finite.
    """
    settings = {**(settings or {}), "share": share}
    for start in starts:
        if start not in STARTS:
            raise UserError(f"there is no start {start!r}; choose from {', '.join(STARTS)}")
    setup = load_setup(run, text=text, data=data, settings=settings, context=context)
    rows_path = output / "finetune.jsonl"
    common = {"settings": settings, "fit_tokens": fit_tokens, "fit_steps": fit_steps, "windows": windows, "seed": seed}
    points = {
        key_of(setup, start=start, flops=budget, learning_rate=rate if budget else None, **common): (
            start,
            budget,
            rate,
        )
        for start in starts
        for budget in flops
        for rate in learning_rates
    }
    done = {row["key"] for row in read_rows(rows_path)}
    missing = {key: point for key, point in points.items() if key not in done}
    _check_budgets(setup, settings, [(start, budget) for start, budget, _ in missing.values()])
    learned: dict[str, NeuronLayer] = {}
    with progress_bar(shown=progress) as bar:
        if any(start != "dense" for start, _, _ in missing.values()):
            inputs = layer_inputs(setup, draw_windows(setup.train, max(1, fit_tokens // setup.context), seed=seed))
            learned = fitted_layers(setup, inputs, settings, steps=fit_steps, seed=seed, bar=bar)
        for key, (start, budget, rate) in missing.items():
            model = _start(setup, learned, start, seed)
            task = bar.add_task(f"{start}, {budget:.3g} FLOPs, {rate:g}", total=1.0)
            trained = _train(model, setup, budget, rate, seed=seed, report=partial(_advance, bar, task))
            limit = min(windows, len(setup.heldout))
            loss = held_out_loss(model, setup.heldout, batch_size=WINDOWS_PER_PASS, limit=limit)
            row = {"key": key, "start": start, "flops": budget, "learning_rate": rate if budget else None}
            row |= {"loss": loss, "perplexity": math.exp(loss), **trained, **common, **provenance()}
            append_row(rows_path, row)
    by_key = {row["key"]: row for row in read_rows(rows_path)}
    return [by_key[key] for key in points]


def _check_budgets(setup: NeuronSetup, settings: Mapping[str, Any], planned: Sequence[tuple[str, float]]) -> None:
    """Raise a UserError where a budget is less than one step, before indices are learned for long."""
    costs = {"dense": model_cost(setup.model, setup.context)}
    if any(start != "dense" for start, _ in planned):
        with replaced(setup, {path: neuron_layer(neurons, settings) for path, neurons in setup.layers.items()}):
            costs["retrieved"] = model_cost(setup.model, setup.context)
    for start, flops in planned:
        _steps(flops, costs["dense" if start == "dense" else "retrieved"], setup)


def _steps(flops: float, cost: Cost, setup: NeuronSetup) -> int:
    step = WINDOWS_PER_PASS * setup.context * cost.training_flops_per_token
    if flops and flops < step:
        raise UserError(f"{flops:g} FLOPs are less than one step, which takes {step:g}: raise the budget")
    return int(flops // step)


def _advance(bar: Progress, task: TaskID, share: float) -> None:
    bar.update(task, completed=share)


def _start(setup: NeuronSetup, learned: Mapping[str, NeuronLayer], start: str, seed: int) -> nn.Module:
    """A copy of the model to train."""
    model = deepcopy(setup.model)
    if start == "dense":
        return model
    torch.manual_seed(seed)
    scales = {
        f"{name}.{path}": scale
        for name, block in model.named_modules()
        if isinstance(block, PeerDecoderLayer)
        for path, scale in block.ffw_scales.items()
    }
    copies: dict[FFWSite, nn.Module] = {}
    for path, layer in learned.items():
        copy = deepcopy(layer)
        if start == "random":
            copy.reset_parameters(output_scale=scales.get(path, 1.0))
        copies[setup.sites[path]] = copy
    put_in_place(model, copies)
    return model


def _train(
    model: nn.Module,
    setup: NeuronSetup,
    flops: float,
    learning_rate: float,
    *,
    seed: int,
    report: Callable[[float], object],
) -> dict[str, Any]:
    """AdamW on the whole model until the FLOPs are spent; what that took."""
    cost = model_cost(model, setup.context)
    tokens_per_step = WINDOWS_PER_PASS * setup.context
    steps = _steps(flops, cost, setup)
    groups = parameter_groups(model, weight_decay=WEIGHT_DECAY)
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))
    torch.manual_seed(seed)
    model.train()
    started = time.perf_counter()
    for step in range(steps):
        progress = (step + 1) / steps
        rate = learning_rate * cosine(progress, warmup=WARMUP, final=FINAL)
        set_learning_rates(optimizer.param_groups, rate, progress=progress)
        input_ids = draw_windows(setup.train, WINDOWS_PER_PASS, seed=seed + 1, start=step * WINDOWS_PER_PASS)
        loss = accumulate_gradients(model, input_ids.to(device_of(model)), micro_batch_size=WINDOWS_PER_PASS)
        norms = clip_gradients(optimizer.param_groups, max_norm=1.0, table_max_norm=1.0)
        if not (math.isfinite(loss.item()) and norms.finite):
            raise TrainingStopped(
                f"finetuning stopped at step {step + 1}: the loss is {loss.item()} and gradient norms are {norms.rest} "
                f"and {norms.table} at learning rate {rate:.3g}; rows before it are kept, take a lower rate",
                exit_code=3,
            )
        optimizer.step()
        report(progress)
    model.eval()
    return {
        "train_steps": steps,
        "train_tokens": steps * tokens_per_step,
        "training_flops_per_token": cost.training_flops_per_token,
        "total_parameters": cost.total_parameters,
        "seconds": time.perf_counter() - started,
    }
