"""Facts of countries taught to a pretrained model by a pack, LoRA or all weights: what is known, what is forgotten.

The text is written from the World Factbook's articles in the embedded corpus; the background is that corpus without
them. Questions are asked before and after, as lines of the text and as sentences that it does not have. Each run is one
row, in the way of `teach.py`.

    python benchmarks/teach_facts.py MODEL --other prose.txt --output runs/facts --json FILE [--method pack lora full]
"""

# ruff: noqa: T201, tables on the terminal are what this is for

import argparse
import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from countries import asked, chosen, documents, write_background, write_lines
from teach import SETTINGS, add_row, has_row, losses, rows_of, summary, taught
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from peerlm.cli.stage_options import learn_config
from peerlm.errors import PeerlmWarning
from peerlm.evaluate import score_last_words
from peerlm.malloc import keep_freed_memory
from peerlm.marks import marks_of
from peerlm.packs.api import loaded_packs
from peerlm.packs.base_hash import base_hash
from peerlm.packs.opening import openings
from peerlm.train.precision import has_bf16_products

Questions = Mapping[str, Sequence[tuple[str, str]]]
RATES = {"pack": 2e-3, "lora": 1e-3, "full": 1e-4}
"""Learning rates, where none is given."""
EVERY = 8
"""Of the questions so many apart tell where gates open."""


def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, questions: Questions) -> dict[str, Any]:
    """Of each form of question the share of values that greedy decoding gives whole, and the nats of a value."""
    found = {}
    for form, passages in questions.items():
        values = score_last_words(model, tokenizer, passages, context=128, batch_size=16, name=form)
        found[form] = {"right": round(values.accuracy, 4), "nats": round(values.nats / values.passages, 4)}
    return found


def gates_open(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, questions: Questions) -> dict[str, Any]:
    """Of each form of question the share of gates of the one pack that open at its last token, where a value begins."""
    start = list(marks_of(model, tokenizer).start)
    shares = {}
    for form, passages in questions.items():
        last = []
        for question, _ in passages[::EVERY]:
            ids = torch.tensor([start + tokenizer(question, add_special_tokens=False).input_ids])
            (share_BT,) = openings(model, ids).values()
            last.append(share_BT[0, -1])
        shares[form] = round(torch.stack(last).mean().item(), 4)
    return shares


def main() -> None:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--countries", type=int, default=24)
    parser.add_argument("--other", type=Path, nargs="*", default=[], help="files that must not be forgotten")
    parser.add_argument("--other-tokens", type=int, default=4096, help="tokens of each that are read")
    parser.add_argument("--method", nargs="+", default=["pack", "lora", "full"], choices=["pack", "lora", "full"])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the (one) method")
    parser.add_argument("--learning-rate", type=float, help="default: by method, " + str(RATES))
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="folder of the texts and the runs")
    parser.add_argument("--json", type=Path, help="file that a row for each run is added to")
    options = parser.parse_args()
    keep_freed_memory()
    options.output.mkdir(parents=True, exist_ok=True)
    corpus = documents()
    countries = chosen(corpus, options.countries)
    questions = asked(countries)
    text, background = options.output / f"countries-{options.countries}.txt", options.output / "background.txt"
    write_lines(text, countries)
    write_background(background, corpus)

    bf16 = has_bf16_products(torch.device("cpu"))

    def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
        what = [base_hash(model), loaded_packs(model), questions, [str(file) for file in options.other], bf16]
        what = json.dumps([*what, options.other_tokens])
        kept = options.output / f"before-{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"
        if kept.exists():  # the base, which no method has changed yet
            return json.loads(kept.read_text())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            found = {"asked": answers(model, tokenizer, questions), "products": "bf16" if bf16 else "fp32"}
            if loaded_packs(model):
                found["open"] = gates_open(model, tokenizer, questions)
            files = {"files": options.other, "context": 512, "limit": options.other_tokens}
            found |= losses(model, tokenizer, **files)
        if not loaded_packs(model):
            kept.write_text(json.dumps(found))
        return found

    for method in options.method:
        settings = [*SETTINGS.get(method, []), *options.set]
        rate = options.learning_rate or RATES[method]
        key = {
            "model": options.model.name,
            "countries": options.countries,
            "method": method,
            "settings": settings,
            "learning_rate": rate,
            "batch_size": options.batch_size,
            "tokens_asked": options.tokens,
            "context": options.context,
            "seed": options.seed,
        }
        if has_row(rows_of(options.json), key):
            print(f"{method}: there is a row")
            continue
        name = "-".join(map(str, [method, *settings, rate, options.batch_size, options.tokens, options.seed]))
        config = learn_config(
            run=str(options.output / name.replace("/", "_")),
            model=str(options.model),
            text=[f"countries={text}"],
            heldout=[f"countries={text}"],
            method=method,
            settings=settings,
            memory={"background": [str(background)]},
            budget={"tokens": options.tokens},
            optim={"learning_rate": rate},
            context=options.context,
            batch_size=options.batch_size,
            heldout_windows=20,
            precision=options.precision,
            seed=options.seed,
            data=str(options.output / f"tokens-{options.countries}"),
        )
        with warnings.catch_warnings():  # what is measured is how well a text is remembered
            warnings.filterwarnings("ignore", ".* is measured on are in the text of ", PeerlmWarning)
            row, before, after = taught(config, measure)
        forms = {form: {"before": before["asked"][form], "after": after["asked"][form]} for form in questions}
        print(summary(method, row))
        for form, figures in forms.items():
            print(f"  {form}: {figures['before']['right']:.1%} right before, {figures['after']['right']:.1%} after")
        add_row(options.json, {**key, **row, "asked": forms, "open": after.get("open"), "measured": after["products"]})


if __name__ == "__main__":
    main()
