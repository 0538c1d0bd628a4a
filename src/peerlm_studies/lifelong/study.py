"""Plasticity against forgetting: a model of one domain learns others, one after another, by each method."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import Any

from rich.console import Console

from peerlm.continual import LearnConfig, learn
from peerlm.continual.stream import BACKGROUND
from peerlm.files import write_bytes, write_json
from peerlm.terminal import print_markdown
from peerlm.train import TrainConfig, train
from peerlm_studies.lifelong.facts import learn_facts, markdown_facts
from peerlm_studies.lifelong.figures import plot_forgetting
from peerlm_studies.lifelong.plan import LifelongPlan, PlannedStream, load_plan
from peerlm_studies.rows import append_row, provenance, read_rows
from peerlm_studies.shards import Shard, read_study, rows_file, say_incomplete

TOOK = ("steps", "tokens", "flops", "seconds", "trained_parameters")


def lifelong(
    recipe: str | Path, overrides: Sequence[str] = (), *, progress: bool = True, shard: Shard | None = None
) -> dict[str, Any]:
    """Make every stream of a recipe (see `lifelong.plan.load_plan`), then write tables and a plot.

    Each stage is a row of OUTPUT/rows.jsonl and is not made again; an interrupted stream resumes from its checkpoint.
    OUTPUT also gets table.md, table.json and forgetting.png, and of [facts] facts.jsonl and facts.md.

    With a shard only its share of the streams is made, with base models and texts of its own in OUTPUT/shards. Tables
    are written when rows of all streams are there; facts are not made.

    Returns:
        "methods", as `summarise` gives them, and "facts", rows of `learn_facts`.

    Raises:
        UserError: a mistake in the recipe or its data.
        TrainingStopped: told to stop, or a loss was not finite.
    """
    plan = load_plan(recipe, overrides)
    console = Console(quiet=not progress)
    path = rows_file(plan.output, shard)
    for stream in plan.streams if shard is None else shard.share(plan.streams, lambda stream: stream.key(0)):
        done = {row["key"] for row in read_study(plan.output)}
        keys = [stream.key(number) for number in range(len(stream.order) + 1)]
        if set(keys) <= done:
            continue
        made = stream if shard is None else _moved(stream, plan.output / "shards" / shard.name)
        train_base(made.base, progress=progress)
        for key, row in zip(keys, run_stream(made.learn, progress=progress), strict=True):
            if key not in done:
                append_row(path, _named(row, stream, key))
        rmtree(made.learn.run)
        last = read_rows(path)[-1]
        console.print(f"{stream.label}, {' '.join(stream.order)}, seed {stream.seed}: {last['loss']}", markup=False)
        if shard is None:
            _write(plan, _rows_of(plan))
    if shard is not None:
        wanted = {stream.key(number) for stream in plan.streams for number in range(len(stream.order) + 1)}
        if lacking := len(wanted - {row["key"] for row in read_study(plan.output)}):
            say_incomplete(lacking, plan.output, console)
            return {"methods": summarise(_rows_of(plan), plan.lifelong.full), "facts": []}
    summary = _write(plan, _rows_of(plan))
    facts = []
    if plan.facts is not None and shard is None:
        facts = learn_facts(plan, plan.facts, progress=progress)
        write_bytes(plan.output / "facts.md", markdown_facts(facts).encode())
    if progress:
        print_markdown((plan.output / "table.md").read_text(encoding="utf-8"))
    return {"methods": summary, "facts": facts}


def train_base(config: TrainConfig, *, progress: bool) -> None:
    """Train a base model, or resume it; nothing where it is finished."""
    train(config, resume="auto", progress=progress)


def run_stream(config: LearnConfig, *, progress: bool, **options: Any) -> list[dict[str, Any]]:
    """All stages of a stream, from where it was stopped."""
    return learn(config, resume="auto", progress=progress, **options)


def _moved(stream: PlannedStream, folder: Path) -> PlannedStream:
    """A stream whose base model, texts and run are in another folder, where no other shard writes."""
    data = replace(stream.base.data, folder=str(folder / "data" / "base"))
    base = replace(stream.base, run=str(folder / "base" / Path(stream.base.run).name), data=data)
    run = str(folder / "streams" / Path(stream.learn.run).name)
    learn = replace(stream.learn, run=run, model=base.run, data=str(folder / "data" / "streams"))
    return replace(stream, base=base, learn=learn)


def _named(row: Mapping[str, Any], stream: PlannedStream, key: str) -> dict[str, Any]:
    return {
        "key": key,
        "label": stream.label,
        "order": stream.order,
        "seed": stream.seed,
        **row,
        "config": {name: getattr(stream.learn, name) for name in ("method", "settings")},
        **provenance(),
    }


def _rows_of(plan: LifelongPlan) -> list[dict[str, Any]]:
    """The rows of this recipe that are there, in its order."""
    by_key = {row["key"]: row for row in read_study(plan.output)}
    return [
        {**by_key[key], "label": stream.label}  # two methods of one configuration share rows
        for stream in plan.streams
        for key in (stream.key(number) for number in range(len(stream.order) + 1))
        if key in by_key
    ]


def summarise(rows: Sequence[Mapping[str, Any]], full: str) -> list[dict[str, Any]]:
    """For each method means over its streams, each compared with the stream of `full` of the same order and seed.

    "forgetting" is the rise of loss of the base's domain since before the first stage. "old_forgetting" is that of each
    domain learned before the last, since its own stage. Both are after the last stage, in nats; "new_loss" is the mean
    over stages of the loss of the stage's domain right after it. "share" is forgetting over that of `full`, "excess"
    new_loss over that of `full`, less 1; None where there is no such stream, share also where full forgot nothing.
    """
    streams: dict[tuple[str, tuple[str, ...], int], list[Mapping[str, Any]]] = {}
    for row in rows:
        streams.setdefault((row["label"], tuple(row["order"]), row["seed"]), []).append(row)
    complete = {key: stream for key, stream in streams.items() if len(stream) == len(key[1]) + 1}
    found: dict[str, list[dict[str, Any]]] = {}
    for (label, order, seed), stream in complete.items():
        figures = _figures(stream)
        reference = complete.get((full, order, seed))
        if reference is not None:
            against = _figures(reference)
            if against["forgetting"] > 0:
                figures["share"] = figures["forgetting"] / against["forgetting"]
            figures["excess"] = figures["new_loss"] / against["new_loss"] - 1
        found.setdefault(label, []).append(figures)
    return [
        {"label": label, "streams": len(each), **{name: _mean([f.get(name) for f in each]) for name in FIGURES}}
        for label, each in found.items()
    ]


FIGURES = (
    "forgetting",
    "old_forgetting",
    "new_loss",
    "share",
    "excess",
    "trained_parameters",
    "flops",
    "seconds",
)


def _figures(stream: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    before, stages = stream[0]["loss"], stream[1:]
    last = stages[-1]["loss"]
    earlier = [last[stage["stage"]] - stage["loss"][stage["stage"]] for stage in stages[:-1]]
    return {
        "forgetting": last[BACKGROUND] - before[BACKGROUND],
        "new_loss": sum(stage["loss"][stage["stage"]] for stage in stages) / len(stages),
        "trained_parameters": stages[-1]["trained_parameters"],
        "flops": sum(stage["flops"] for stage in stages),
        "seconds": sum(stage["seconds"] for stage in stages),
        **({"old_forgetting": sum(earlier) / len(earlier)} if earlier else {}),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def markdown_lifelong(summary: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], base: str) -> str:
    """The table of methods, then for each stream its matrix of perplexities, in Markdown."""
    lines = [
        "| method | streams | forgetting, nats | of full's | earlier domains, nats | new loss, nats | above full's "
        "| parameters trained | FLOPs | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in summary:
        cells = [
            row["label"],
            str(row["streams"]),
            _cell(row["forgetting"], "{:+.3f}"),
            _cell(row["share"], "{:.0%}"),
            _cell(row["old_forgetting"], "{:+.3f}"),
            _cell(row["new_loss"], "{:.3f}"),
            _cell(row["excess"], "{:+.1%}"),
            _cell(row["trained_parameters"], "{:,.0f}"),
            _cell(row["flops"], "{:.2e}"),
            _cell(row["seconds"], "{:,.0f}"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    domains = [base, *(name for name in rows[0]["loss"] if name != BACKGROUND)] if rows else []
    lines += ["", "| method | order, seed | after | " + " | ".join(domains) + " |", "|---" * (len(domains) + 3) + "|"]
    for row in rows:
        perplexities = (row["perplexity"][BACKGROUND if name == base else name] for name in domains)
        cells = [row["label"], f"{' '.join(row['order'])}, {row['seed']}", row["stage"] or "nothing"]
        lines.append("| " + " | ".join([*cells, *(f"{each:,.1f}" for each in perplexities)]) + " |")
    return "\n".join([*lines, ""])


def _cell(value: float | None, form: str) -> str:
    return "" if value is None or not math.isfinite(value) else form.format(value)


def _write(plan: LifelongPlan, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    summary = summarise(rows, plan.lifelong.full)
    write_json(plan.output / "table.json", {"methods": summary})
    write_bytes(plan.output / "table.md", markdown_lifelong(summary, rows, plan.lifelong.base).encode())
    if summary:
        plot_forgetting(summary, plan.output / "forgetting.png")
    return summary
