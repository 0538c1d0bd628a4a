"""A pack, LoRA with as many trained numbers, or another way to learn: what each learns of a text, what others lose.

Each run is what `peerlm learn` does, in a folder of its own, and one row. Started again with the same arguments, the
script resumes what was stopped, and leaves out runs that have a row.

    python benchmarks/teach.py MODEL --text docs.txt --heldout docs_heldout.txt --other prose.txt
        --output runs/teach --json FILE [--method pack lora full] [--tokens 32768]

The methods grow and sparse need a model with PEER layers, as `peerlm convert MODEL` makes it.
"""

# ruff: noqa: T201, tables on the terminal are what this is for

import argparse
import datetime
import json
import platform
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from peerlm.cli.stage_options import learn_config
from peerlm.continual import LearnConfig, learn
from peerlm.continual.methods import METHODS
from peerlm.continual.stream import Measure
from peerlm.evaluate import score_last_words, score_text
from peerlm.evaluate.files import PASSAGE, fields_of, read_document_parts, read_passages
from peerlm.malloc import keep_freed_memory

SETTINGS = {"lora": ["rank=16"]}
"""Of a method: rank 16 in all linear layers of a model of 135 million numbers trains 4.9 million, as a pack does."""


def losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, files: Sequence[Path], context: int, limit: int
) -> dict[str, Any]:
    """Of each file the nats per token, or per last word, over its first `limit` tokens."""
    found = {}
    for file in files:
        fields = fields_of(file)
        options: dict[str, Any] = {"context": context, "batch_size": 2, "limit": limit, "name": file.name}
        if fields == PASSAGE:
            words = score_last_words(model, tokenizer, read_passages(file), **options)
            found[file.name] = words.nats / words.passages
        else:
            text = score_text(model, tokenizer, read_document_parts(file, fields), stride=context, **options)
            found[file.name] = text.nats / text.tokens
    return {"other": found}


def change(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """By text, its loss before and after, and the change in percent."""
    return {
        name: {
            "before": round(before[name], 5),
            "after": round(after[name], 5),
            "percent": round(100 * (after[name] / before[name] - 1), 3),
        }
        for name in before
    }


def write_text(path: Path, content: str) -> None:
    """Write a file, unless it has that content: prepared text is prepared again when its source has changed."""
    if not path.is_file() or path.read_text(encoding="utf-8") != content:
        path.write_text(content, encoding="utf-8")


def rows_of(file: Path | None) -> list[dict[str, Any]]:
    """Rows of a file, none where there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file and file.exists() else []


def has_row(rows: Sequence[Mapping[str, Any]], key: Mapping[str, Any]) -> bool:
    """Whether one of the rows has all of these."""
    return any(key == {name: row.get(name) for name in key} for row in rows)


def add_row(file: Path | None, row: Mapping[str, Any]) -> None:
    """Add a row to a file, if there is one."""
    if file:
        with file.open("a") as rows:
            rows.write(json.dumps(row) + "\n")


def setting() -> dict[str, Any]:
    """What a row says of where it was made."""
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "date": datetime.date.today().isoformat(),
    }


def taught(config: LearnConfig, measure: Measure) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Learn one stage as configured, or resume it: what a row says of it, and the figures before and after."""
    started = time.perf_counter()
    before, after = learn(config, resume="auto", measure=measure)
    row = {
        "trained_parameters": after["trained_parameters"],
        "megabytes": sum(
            path.stat().st_size for part in ("pack", "adapter") for path in Path(config.run).glob(f"stages/*/{part}/*")
        )
        / 1e6,
        "tokens": after["tokens"],
        "steps": after["steps"],
        "peak_memory_bytes": after["peak_memory_bytes"],
        "loss": change(before["loss"], after["loss"]) | change(before["other"], after["other"]),
        "gates": after.get("gates"),
        "precision": before["precision"],
        "training_seconds": round(after["seconds"], 1),
        "seconds": round(time.perf_counter() - started, 1),
        **setting(),
    }
    return row, before, after


def summary(method: str, row: Mapping[str, Any]) -> str:
    """A row in one line."""
    changes = ", ".join(f"{text} {figures['percent']:+.2f}%" for text, figures in row["loss"].items())
    return f"{method}: {row['trained_parameters']:,} trained, {row['seconds']:.0f} s: {changes}"


def main() -> None:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, help="other documents of the text's kind; default: held out of it")
    parser.add_argument("--other", type=Path, nargs="*", default=[], help="files that are no part of it")
    parser.add_argument("--other-tokens", type=int, default=8192, help="tokens of each that are read")
    parser.add_argument("--method", nargs="+", default=["pack", "lora"], choices=METHODS)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the (one) method")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--table-lr-multiplier", type=float, help="learning rate of experts over that of the rest")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tokens", type=int, help="default: the text once")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--background", type=Path)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--json", type=Path, help="file that a row for each run is added to")
    options = parser.parse_args()
    keep_freed_memory()
    rows = rows_of(options.json)
    for method in options.method:
        settings = [*SETTINGS.get(method, []), *options.set]
        key = {
            "model": options.model.name,
            "text": options.text.name,
            "method": method,
            "settings": settings,
            "learning_rate": options.learning_rate,
            "table_lr_multiplier": options.table_lr_multiplier,
            "batch_size": options.batch_size,
            "tokens_asked": options.tokens,
            "context": options.context,
            "seed": options.seed,
        }
        optim = {name: key[name] for name in ("learning_rate", "table_lr_multiplier") if key[name] is not None}
        if has_row(rows, key):
            print(f"{method}: there is a row")
            continue
        rates = [f"{rate:g}" for rate in optim.values()]
        name = "-".join([method, *settings, *rates, str(options.tokens or "once"), f"seed={options.seed}"])
        folder = options.output / name.replace("/", "_")
        config = learn_config(
            run=str(folder),
            model=str(options.model),
            text=[f"new={options.text}"],
            heldout=[] if options.heldout is None else [f"new={options.heldout}"],
            method=method,
            settings=settings,
            memory={"background": [] if options.background is None else [str(options.background)]},
            budget={"tokens": options.tokens},
            optim=optim,
            context=options.context,
            batch_size=options.batch_size,
            precision=options.precision,
            seed=options.seed,
        )
        measure = partial(losses, files=options.other, context=options.context, limit=options.other_tokens)
        row = {**key, **taught(config, measure)[0]}
        print(summary(method, row))
        add_row(options.json, row)


if __name__ == "__main__":
    main()
