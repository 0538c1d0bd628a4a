"""A pack and LoRA with as many trained numbers on the same text: what each learns of it, and what other text loses.

Each run is what `peerlm learn` does, in a folder of its own, and one row. Started again with the same arguments, the
script resumes what was stopped, and leaves out runs that have a row.

    python benchmarks/teach.py MODEL --text docs.txt --heldout docs_heldout.txt --other prose.txt
        --output runs/teach --json FILE [--method pack lora] [--tokens 32768]
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
from peerlm.continual import learn
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


def main() -> None:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, help="other documents of the text's kind; default: held out of it")
    parser.add_argument("--other", type=Path, nargs="*", default=[], help="files that are no part of it")
    parser.add_argument("--other-tokens", type=int, default=8192, help="tokens of each that are read")
    parser.add_argument("--method", nargs="+", default=["pack", "lora"], choices=["pack", "lora"])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the (one) method")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
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
    rows = [json.loads(line) for line in options.json.open()] if options.json and options.json.exists() else []
    for method in options.method:
        settings = [*SETTINGS.get(method, []), *options.set]
        key = {
            "model": options.model.name,
            "text": options.text.name,
            "method": method,
            "settings": settings,
            "learning_rate": options.learning_rate,
            "batch_size": options.batch_size,
            "tokens_asked": options.tokens,
            "context": options.context,
            "seed": options.seed,
        }
        if any(key == {name: row.get(name) for name in key} for row in rows):
            print(f"{method}: there is a row")
            continue
        name = "-".join([method, *settings, f"{options.learning_rate:g}", str(options.tokens or "once")])
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
            optim={"learning_rate": options.learning_rate},
            context=options.context,
            batch_size=options.batch_size,
            precision=options.precision,
            seed=options.seed,
        )
        started = time.perf_counter()
        measure = partial(losses, files=options.other, context=options.context, limit=options.other_tokens)
        before, after = learn(config, resume="auto", measure=measure)
        row = {
            **key,
            "trained_parameters": after["trained_parameters"],
            "megabytes": sum(path.stat().st_size for path in folder.glob("stages/*/pack/*")) / 1e6,
            "tokens": after["tokens"],
            "steps": after["steps"],
            "loss": change(before["loss"], after["loss"]) | change(before["other"], after["other"]),
            "gates": after.get("gates"),
            "precision": before["precision"],
            "training_seconds": round(after["seconds"], 1),
            "seconds": round(time.perf_counter() - started, 1),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "date": datetime.date.today().isoformat(),
        }
        changes = ", ".join(f"{text} {figures['percent']:+.2f}%" for text, figures in row["loss"].items())
        print(f"{method}: {row['trained_parameters']:,} trained, {row['seconds']:.0f} s: {changes}")
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
