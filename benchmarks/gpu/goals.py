"""What our kernels are to reach on one card, and whether the rows of a run show it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Rows = Sequence[Mapping[str, Any]]
Measured = Callable[[Rows], float | None]
"""None where the rows do not say it."""
OURS = "peerlm, triton"
THEIRS = "PEER-pytorch"
DENSE = "dense, 4 D neurons"
MANY = 65_536
AFTER, BEFORE, EQUAL = "PEER, triton, graph", "PEER, reference", "dense, equal FLOPs, graph"
"""Language models: the kernels, what there was without them, and the dense one of equal FLOPs."""


@dataclass(frozen=True)
class Goal:
    """A number of a run that should be `least` or more, as 1 of what should be so."""

    text: str
    least: float | None
    """None of a figure that is reported as it is."""
    measured: Measured


def _times(of: str, over: str, case: str, **figures: object) -> Measured:
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


def _all_ok(section: str, case: str = "triton") -> Measured:
    """The share of a section's checks of ours that are right; of those whose case begins so."""

    def measured(rows: Rows) -> float | None:
        checks = [row for row in rows if row["section"] == section and row["case"].startswith(case)]
        checks = [row for row in checks if "ok" in row or "failed" in row]
        return sum(bool(row.get("ok")) for row in checks) / len(checks) if checks else None

    return measured


def _trains_alone(rows: Rows) -> float | None:
    """1 where ours takes a step at so many tokens that PEER-pytorch is out of memory."""
    steps = {
        row["contender"]: row for row in rows if row["section"] == "many-tokens" and row["case"].startswith("step /")
    }
    if OURS not in steps or THEIRS not in steps:
        return None
    return float("ms" in steps[OURS] and bool(steps[THEIRS].get("out_of_memory")))


def _figure(section: str, case: str, name: str) -> Measured:
    """A figure of one row."""

    def measured(rows: Rows) -> float | None:
        return next((r[name] for r in rows if r["section"] == section and r["case"] == case and name in r), None)

    return measured


def _over(first: Measured, second: Measured) -> Measured:
    """One figure over another."""

    def measured(rows: Rows) -> float | None:
        above, below = first(rows), second(rows)
        return above / below if above is not None and below else None

    return measured


def _share_missed(keys: str) -> Measured:
    return _figure("correctness", f"triton, share searched whole, {keys}", "share")


def _of_model(name: str, figure: str) -> Measured:
    return _figure("language-model", name, figure)


_SPEED = "tokens_per_s"
GOALS = (
    *(
        Goal(
            f"experts forward, share of the gather limit, D={dim}, {ids}",
            least,
            _times("gather alone", OURS, "experts forward", section="kernels", dim=dim, ids=ids, tokens=8192),
        )
        for dim, least in ((1024, 0.88), (256, 0.80))
        for ids in ("uniform", "zipf")
    ),
    Goal(
        "experts forward, share of the gather limit, D=1024, T=64k",
        0.88,
        _times("gather alone", OURS, "experts forward", section="kernels", dim=1024, ids="uniform", tokens=MANY),
    ),
    Goal(
        "experts forward, share of the gather limit, D=1024, T=1",
        None,
        _times("gather alone", OURS, "experts forward", section="kernels", dim=1024, ids="uniform", tokens=1),
    ),
    *(
        Goal(
            f"row update, share of the read-and-write ceiling, {rows}",
            0.80,
            _times("read and write alone", "peerlm, lazy AdamW", "row update", section="kernels", rows=rows),
        )
        for rows in ("float32", "bfloat16")
    ),
    *(
        Goal(
            f"retrieval, times as fast as torch's scores and top-k, {said}",
            3.0,
            _times("torch's scores and top-k alone", OURS, "retrieval", section="kernels", heads=heads, tokens=tokens),
        )
        for said, heads, tokens in (("T=8k", 8, 8192), ("T=64k", 8, MANY), ("h=1", 1, 8192))
    ),
    *(
        Goal(f"{case}, times as fast as PEER-pytorch", least, _times(THEIRS, OURS, case, section="layer"))
        for case, least in (("forward", 3.5), ("backward", 4.0), ("step", 4.0))
    ),
    Goal(
        "forward, times as fast as PEER-pytorch by max-autotune",
        1.6,
        _times("PEER-pytorch, compiled, max-autotune", OURS, "forward", section="compiled"),
    ),
    Goal(
        "forward of 65,536 tokens, times as fast as PEER-pytorch",
        3.5,
        _times(THEIRS, OURS, "forward", section="many-tokens"),
    ),
    Goal("a step of 65,536 tokens; PEER-pytorch is out of memory", 1, _trains_alone),
    *(
        Goal(
            f"one head, {case}, T={tokens:,}, times as fast as dense 4 D",
            1.0 if (case, tokens) == ("step", 8192) else None,
            _times(DENSE, OURS, case, section="one-head", tokens=tokens),
        )
        for case in ("forward", "backward", "step")
        for tokens in (8192, MANY)
    ),
    Goal(
        "language model, tokens per second, PEER over equal FLOPs",
        None,
        _over(_of_model(AFTER, _SPEED), _of_model(EQUAL, _SPEED)),
    ),
    Goal(
        "language model, tokens per second, PEER after over before",
        None,
        _over(_of_model(AFTER, _SPEED), _of_model(BEFORE, _SPEED)),
    ),
    *(
        Goal(f"language model, share of peak, {name}", None, _of_model(name, "share_of_peak"))
        for name in (AFTER, BEFORE, EQUAL)
    ),
    *(
        Goal(f"share of searches that needed the fallback, {keys}", None, _share_missed(keys))
        for keys in ("normal keys", "trained keys")
    ),
    Goal("ids equal to the exhaustive search on trained keys", 1, _all_ok("correctness", "triton, ids, trained keys")),
    Goal("offsets above 2^31 numbers", 1, _all_ok("correctness", "triton, experts beyond 2^31")),
    Goal("checks of correctness that are right", 1, _all_ok("correctness")),
    Goal("no host synchronisation in a step", 1, _all_ok("graphs", "triton, step without synchronisation")),
    Goal("graph replay has the bits of eager steps", 1, _all_ok("graphs", "triton, graph of a step")),
    Goal("two runs have the same bits", 1, _all_ok("graphs", "triton, same bits of steps twice")),
    Goal("checks of synchronisation and graphs that are right", 1, _all_ok("graphs")),
    Goal("rows in places have the bits of a table in memory", 1, _all_ok("cached-rows")),
    Goal(
        "rows in places, step time of a table in memory over theirs",
        None,
        _times("peerlm, in memory", "peerlm, rows in places", "step", section="cached-rows"),
    ),
    Goal("entries found in places", None, _figure("cached-rows", "step, entries found on the card", "share")),
    Goal("checks under compute-sanitizer that are right", 1, _all_ok("sanitizer")),
)


def lines(rows: Rows) -> list[str]:
    """A table of 80 columns: goal, at least, measured."""
    found = [f"{'goal':60} {'least':>8} {'found':>8}"]
    for goal in GOALS:
        number = goal.measured(rows)
        said = "-" if number is None else f"{number:.2f}" if goal.least is not None else f"{number:.3g}"
        least = "" if goal.least is None else f"{goal.least:.2f}"
        missed = number is not None and goal.least is not None and number < goal.least
        found.append(f"{goal.text:60} {least:>8} {said:>8}{' !' if missed else ''}".rstrip())
    return found
