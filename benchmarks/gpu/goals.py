"""What our kernels are to reach on one card, and whether the rows of a run show it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Rows = Sequence[Mapping[str, Any]]
OURS = "peerlm, triton"


@dataclass(frozen=True)
class Goal:
    """A number of a run that should be `least` or more, as 1 of what should be so."""

    text: str
    least: float
    measured: Callable[[Rows], float | None]
    """None where the rows do not say it."""


def _times(of: str, over: str, case: str, **figures: object) -> Callable[[Rows], float | None]:
    """How many times as long the first contender takes as the second, in one case of one section."""

    def measured(rows: Rows) -> float | None:
        times = {
            row["contender"]: row["ms"]
            for row in rows
            if "ms" in row
            and row["case"] == f"{case} / {row['contender']}"
            and all(row.get(name) == value for name, value in figures.items())
        }
        return times[of] / times[over] if of in times and times.get(over) else None

    return measured


def _all_ok(section: str) -> Callable[[Rows], float | None]:
    """The share of a section's checks of ours that are right."""

    def measured(rows: Rows) -> float | None:
        checks = [row for row in rows if row["section"] == section and row["case"].startswith("triton")]
        checks = [row for row in checks if "ok" in row or "failed" in row]
        return sum(bool(row.get("ok")) for row in checks) / len(checks) if checks else None

    return measured


def _trains_alone(rows: Rows) -> float | None:
    """1 where ours takes a step at so many tokens that PEER-pytorch is out of memory."""
    steps = {
        row["contender"]: row for row in rows if row["section"] == "many-tokens" and row["case"].startswith("step /")
    }
    if OURS not in steps or "PEER-pytorch" not in steps:
        return None
    return float("ms" in steps[OURS] and bool(steps["PEER-pytorch"].get("out_of_memory")))


GOALS = (
    *(
        Goal(
            f"experts forward, share of the gather limit, D={dim}, {ids}",
            least,
            _times("gather alone", OURS, "experts forward", section="kernels", dim=dim, ids=ids),
        )
        for dim, least in ((1024, 0.88), (256, 0.80))
        for ids in ("uniform", "zipf")
    ),
    *(
        Goal(
            f"row update, share of the read-and-write ceiling, {rows}",
            0.80,
            _times("read and write alone", "peerlm, lazy AdamW", "row update", section="kernels", rows=rows),
        )
        for rows in ("float32", "bfloat16")
    ),
    Goal(
        "retrieval, times as fast as torch's scores and top-k",
        3.0,
        _times("torch's scores and top-k alone", OURS, "retrieval", section="kernels", heads=8),
    ),
    *(
        Goal(
            f"{case}, times as fast as PEER-pytorch",
            least,
            _times("PEER-pytorch", OURS, case, section="layer"),
        )
        for case, least in (("forward", 3.5), ("backward", 4.0), ("step", 4.0))
    ),
    Goal(
        "forward, times as fast as PEER-pytorch by max-autotune",
        1.6,
        _times("PEER-pytorch, compiled, max-autotune", OURS, "forward", section="compiled"),
    ),
    Goal("a step of 65,536 tokens; PEER-pytorch is out of memory", 1, _trains_alone),
    Goal("checks of correctness that are right", 1, _all_ok("correctness")),
    Goal("checks of synchronisation and graphs that are right", 1, _all_ok("graphs")),
)


def lines(rows: Rows) -> list[str]:
    """A table of 80 columns: goal, at least, measured."""
    found = [f"{'goal':60} {'least':>8} {'found':>8}"]
    for goal in GOALS:
        number = goal.measured(rows)
        said = "-" if number is None else f"{number:.2f}"
        missed = number is not None and number < goal.least
        found.append(f"{goal.text:60} {goal.least:>8.2f} {said:>8}{' !' if missed else ''}".rstrip())
    return found
