"""Facts learned late: articles of the World Factbook that a base model never saw, asked for by cloze afterwards.

The embedded corpus has the articles. Each line `field: value` is written with its country before it, so that a window
of text says of which country it speaks; the rest of an article is left out.
"""

import hashlib
import html
import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from peerlm.continual import StageConfig, learn
from peerlm.data import END_OF_TEXT, read_documents
from peerlm.errors import PeerlmWarning
from peerlm.evaluate.files import read_documents as read_text
from peerlm.evaluate.files import read_passages
from peerlm.evaluate.lambada import score_last_words
from peerlm.evaluate.perplexity import score_text
from peerlm.files import write_bytes
from peerlm.train import train
from peerlm.train.config import BudgetConfig
from peerlm.train.recipe import from_dict
from peerlm_studies.lifelong.plan import FactsConfig, PlannedStream
from peerlm_studies.rows import append_row, provenance, read_rows

if TYPE_CHECKING:
    from peerlm_studies.lifelong.plan import LifelongPlan

ASKED = ("Location", "Capital", "Government type", "Climate", "Currency", "Languages", "Religions", "Independence")
"""Fields that are asked for; the text calls the capital `name`."""
NAME = r"[A-Z][\w' ()-]+"
MOST_WORDS = 12
"""Words of a value that is asked for: those before its first semicolon or parenthesis, and no more than this."""
PROSE_TOKENS = 20_000
HELD_OUT = "Countries"
"""A document of its own among the articles: preparing a text holds out its smallest one."""


def articles(documents: Sequence[str]) -> dict[str, dict[str, str]]:
    """Countries of the World Factbook among documents, and the value of each field of theirs."""
    found = {}
    for document in documents:
        first, _, text = document.strip().partition("\n")
        name = html.unescape(first)
        fields = dict(re.findall(r"^([A-Z][A-Za-z -]{2,28}|name): (\S.*)$", text, flags=re.MULTILINE))
        if {"Location", "Climate", "name", "Currency"} <= fields.keys() and re.fullmatch(NAME, name):
            fields["Capital"] = fields.pop("name")
            found[name] = {field: value.strip() for field, value in fields.items() if field != "Background"}
    return found


def choose_countries(names: Sequence[str], number: int) -> list[str]:
    """That many of the names: those whose SHA-256 come first."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())[:number]


def article_text(name: str, fields: Mapping[str, str]) -> str:
    """What a model reads of a country."""
    return "\n".join(f"{name} - {field}: {value}" for field, value in fields.items())


def questions(name: str, fields: Mapping[str, str]) -> list[tuple[str, str]]:
    """Clozes of a country: what stands before a value, and the value."""
    asked = []
    for field in ASKED:
        value = " ".join(re.split(r"[;(]", fields.get(field, ""))[0].split()[:MOST_WORDS]).rstrip(",")
        if value:
            asked.append((f"{name} - {field}:", value))
    return asked


def write_texts(documents: Sequence[str], folder: Path, number: int) -> tuple[Path, Path, list[tuple[str, str]]]:
    """Write what a base is trained on and what is learned later; their files, and the clozes of the latter."""
    found = articles(documents)
    chosen = choose_countries(list(found), number)
    kept = [document for document in documents if html.unescape(document.strip().partition("\n")[0]) not in found]
    kept += [article_text(name, fields) for name, fields in found.items() if name not in chosen]
    base, late = folder / "without.txt", folder / "countries.txt"
    folder.mkdir(parents=True, exist_ok=True)
    for path, texts in ((base, kept), (late, [HELD_OUT, *(article_text(name, found[name]) for name in chosen)])):
        content = f"\n{END_OF_TEXT}\n".join(texts).encode()
        if not path.is_file() or path.read_bytes() != content:
            write_bytes(path, content)
    return base, late, [question for name in chosen for question in questions(name, found[name])]


def learn_facts(plan: "LifelongPlan", facts: FactsConfig, *, progress: bool) -> list[dict[str, Any]]:
    """For each seed train a base without the countries, and let each method learn them; rows before and after.

    Each row has "asked", perplexity and accuracy of the values, and as far as the recipe names files "prose", the loss,
    and "lambada". Rows of OUTPUT/facts.jsonl are not made again.
    """
    folder = plan.output / "facts"
    base_text, late_text, asked = write_texts(list(read_documents(["demo"])), folder, facts.countries)
    path, rows = plan.output / "facts.jsonl", []
    for stream in _streams(plan, facts):
        key = _key(stream, facts)
        done = [row for row in read_rows(path) if row["key"] == key]
        if len(done) < 2:
            base = replace(
                stream.base,
                run=str(folder / "base" / f"seed={stream.seed}"),
                data=replace(stream.base.data, folder=str(folder / "data" / "base"), sources=(str(base_text),)),
            )
            train(base, resume="auto", progress=progress)
            config = replace(
                stream.learn,
                run=str(folder / "streams" / f"{stream.label} seed={stream.seed}".replace(" ", "_").replace("/", "_")),
                model=base.run,
                stages=(StageConfig(name="countries", text=(str(late_text),), heldout=str(late_text)),),
                memory=replace(stream.learn.memory, background=(str(base_text),), heldout=None),
                data=str(folder / "data" / "streams"),
                budget=from_dict(BudgetConfig, facts.budget) if facts.budget else stream.learn.budget,
            )
            context = stream.base.data.context

            def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
                return _measure(model, tokenizer, asked, facts, context)  # noqa: B023

            with warnings.catch_warnings():  # what is measured is how well a text is remembered
                warnings.filterwarnings("ignore", ".* is measured on are in the text of ", PeerlmWarning)
                learned = learn(config, resume="auto", progress=progress, measure=measure)
            for number, row in enumerate(learned):
                if number >= len(done):
                    append_row(path, {"key": key, "label": stream.label, "seed": stream.seed, **row, **provenance()})
            rmtree(config.run)
        rows += [row for row in read_rows(path) if row["key"] == key]
    return rows


def _streams(plan: "LifelongPlan", facts: FactsConfig) -> list[PlannedStream]:
    """One stream for each seed and method that is asked for."""
    first = plan.lifelong.orders[0]
    wanted = [stream for stream in plan.streams if stream.order == first]
    return [stream for stream in wanted if not facts.methods or stream.label in facts.methods]


def _key(stream: PlannedStream, facts: FactsConfig) -> str:
    content = json.dumps([stream.key(0), facts.countries, facts.budget, facts.lambada_limit, ASKED])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    asked: Sequence[tuple[str, str]],
    facts: FactsConfig,
    context: int,
) -> dict[str, Any]:
    values = score_last_words(model, tokenizer, asked, context=context)
    figures: dict[str, Any] = {"asked": {"perplexity": values.perplexity, "accuracy": values.accuracy}}
    if facts.prose:
        text = score_text(model, tokenizer, read_text(Path(facts.prose), ()), context=context, limit=PROSE_TOKENS)
        figures["prose"] = text.nats / text.tokens
    if facts.lambada:
        words = score_last_words(
            model, tokenizer, read_passages(Path(facts.lambada)), context=context, limit=facts.lambada_limit
        )
        figures["lambada"] = {"nats": words.nats / words.passages, "accuracy": words.accuracy}
    return figures


def markdown_facts(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of `learn_facts` as a table."""
    lines = [
        "| method, seed | after | nats of a value | values right | prose, nats | LAMBADA, nats of the word |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        prose = "" if "prose" not in row else f"{row['prose']:.3f}"
        lambada = "" if "lambada" not in row else f"{row['lambada']['nats']:.3f}"
        nats = math.log(row["asked"]["perplexity"])
        lines.append(
            f"| {row['label']}, {row['seed']} | {row['stage'] or 'nothing'} | {nats:.1f} "
            f"| {row['asked']['accuracy']:.1%} | {prose} | {lambada} |"
        )
    return "\n".join([*lines, ""])
