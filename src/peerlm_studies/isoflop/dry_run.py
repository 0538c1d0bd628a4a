"""What the runs of an isoFLOP recipe would take, without data, weights or training."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from peerlm.accounting import model_cost
from peerlm.errors import UserError
from peerlm.train.budget import Budget
from peerlm.train.build import new_model
from peerlm_studies.isoflop.plan import IsoflopPlan
from peerlm_studies.markdown import markdown_rows
from peerlm_studies.memory import training_bytes


def dry_run(plan: IsoflopPlan, *, gpu_tflops: float, utilisation: float, **part: Any) -> list[dict[str, Any]]:
    """One row per method, budget and size, from models on the meta device.

    Memory is that of `training_bytes` for one micro-batch. Hours are of one GPU: FLOPs by `peerlm.accounting` over what
    the GPU does at the utilisation that the caller states.

    Args:
        plan: sizes of vocabulary are data.vocab_size.
        gpu_tflops: 1e12 FLOPs a second that the GPU has.
        utilisation: share of them that training uses, above 0, at most 1.
        part: methods, budgets and sizes, as for `IsoflopPlan.runs`.

    Raises:
        UserError: a figure out of range, a model that cannot be built, or a budget of less than a step.
    """
    if not 0 < gpu_tflops < math.inf:
        raise UserError(f"--gpu-tflops {gpu_tflops:g} must be above 0 and finite")
    if not 0 < utilisation <= 1:
        raise UserError(f"--utilisation {utilisation:g} must be above 0 and at most 1")
    rows = []
    for run in plan.runs(plan.compare.seeds[:1], **part):
        train = run.planned.train
        with torch.device("meta"):
            model = new_model(train, vocab_size=train.data.vocab_size)
        cost = model_cost(model, train.data.context)
        tokens_per_step = train.data.batch_size * train.data.context
        budget = Budget.plan(
            train.budget, tokens_per_step=tokens_per_step, flops_per_token=[cost.training_flops_per_token]
        )
        flops = budget.limit * tokens_per_step * cost.training_flops_per_token
        memory = training_bytes(
            cost.total_parameters,
            model.config,
            tokens=(train.data.micro_batch_size or train.data.batch_size) * train.data.context,
            bf16=train.precision == "bf16",
            gradient_checkpointing=train.gradient_checkpointing,
        )
        rows.append(
            {
                "flops": run.flops,
                "method": run.method,
                "size": run.size,
                "total_parameters": cost.total_parameters,
                "active_parameters": cost.active_parameters,
                "tokens": int(budget.limit) * tokens_per_step,
                "steps": int(budget.limit),
                "memory_gib": memory / 2**30,
                "row_bytes": cost.row_bytes_per_token,
                "decoding_bytes": cost.parameter_bytes_per_token,
                "table_gib": cost.table_training_bytes / 2**30,
                "gpu_hours": flops / (gpu_tflops * 1e12 * utilisation) / 3600,
            }
        )
    return rows


def dry_run_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `dry_run` as a table in Markdown."""
    return markdown_rows(
        {
            "FLOPs": [f"{row['flops']:g}" for row in rows],
            "method": [row["method"] for row in rows],
            "size": [row["size"] for row in rows],
            "parameters": [f"{row['total_parameters'] / 1e6:,.1f}M" for row in rows],
            "active": [f"{row['active_parameters'] / 1e6:,.1f}M" for row in rows],
            "tokens": [f"{row['tokens'] / 1e9:,.3g}G" for row in rows],
            "steps": [f"{row['steps']:,}" for row in rows],
            "GiB": [f"{row['memory_gib']:,.1f}" for row in rows],
            "of tables": [f"{row['table_gib']:,.1f}" for row in rows],
            "rows, KiB/token": [f"{row['row_bytes'] / 2**10:,.0f}" for row in rows],
            "decoding, KiB/token": [f"{row['decoding_bytes'] / 2**10:,.0f}" for row in rows],
            "GPU hours": [f"{row['gpu_hours']:,.3g}" for row in rows],
        }
    )
