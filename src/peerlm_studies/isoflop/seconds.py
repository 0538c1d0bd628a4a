"""What the runs of an isoFLOP study cost in seconds, and when those of different runs can be compared."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from peerlm.errors import UserError
from peerlm_studies.isoflop.plan import IsoflopPlan

Row = Mapping[str, Any]
Cost = Callable[[Row], float | None]
"""What a run cost; None where that is not known."""


def seconds_of(row: Row) -> float:
    """Seconds that a run's training took, of its processor alone where it was trained on one.

    Wall-clock seconds count what else the machine did meanwhile. Processor seconds, divided by threads, do not, or
    hardly: runs beside each other still share caches and memory.
    """
    summary = row["summary"]
    if summary["device"] == "cpu" and "cpu_seconds" in summary:
        return float(summary["cpu_seconds"] / summary["threads"])
    return float(summary["seconds"])


def comparable_seconds(rows: Iterable[Row]) -> Cost:
    """`seconds_of` runs of which all were trained on CPUs, or none; of others nothing is known."""
    on_cpu = {row["summary"]["device"] == "cpu" for row in rows}
    return seconds_of if len(on_cpu) == 1 else lambda row: None


def seconds_at_speeds(plan: IsoflopPlan, speeds: Sequence[Row]) -> Cost:
    """What a run's tokens take at the speed that was measured of its method and size, wherever the run was made.

    Args:
        plan: the study.
        speeds: rows of `peerlm_studies.isoflop.cost`, of which those for the study's batch size count.

    Raises:
        UserError: speeds were measured with different numbers of threads.
    """
    model_of = {run.planned.key(plan.compare): run for run in plan.runs(plan.all_seeds, whole=True)}
    measured = [
        (run, row)
        for row in speeds
        if (run := model_of.get(row["key"])) is not None and row["batch_size"] == run.planned.train.data.batch_size
    ]
    if len(threads := {row["threads"] for _, row in measured}) > 1:
        raise UserError(f"speeds were measured with {sorted(threads)} threads: keep the rows of one number")
    per_token = {(run.method, run.size): row["train_seconds"] for run, row in measured}

    def cost(row: Row) -> float | None:
        run = model_of.get(row["key"])
        speed = None if run is None else per_token.get((run.method, run.size))
        return None if speed is None else speed * row["summary"]["tokens"]

    return cost
