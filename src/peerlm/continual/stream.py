"""A stream of domains, learned one after another; after each, how well the model knows all of them."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from rich.progress import Progress, TaskID
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from peerlm.continual.config import LearnConfig, StageConfig
from peerlm.continual.method import Stage
from peerlm.continual.methods import method_of
from peerlm.continual.overlap import warn_of_overlap
from peerlm.continual.retention import ReplayBuffer
from peerlm.continual.stage import Lesson, learn_stage
from peerlm.continual.text import Text, read_text
from peerlm.data.tokenizer import keep_start
from peerlm.errors import UserError, shortened
from peerlm.evaluate import held_out_loss
from peerlm.evaluate.held_out import Windows, windows_read
from peerlm.evaluate.likelihood import check_context, device_of, exp
from peerlm.evaluate.loading import default_context, model_folder, trained_context
from peerlm.evaluate.progress import progress_bar
from peerlm.files import is_partial, remove_partials, write_bytes, write_json
from peerlm.marks import Marks, marked, marks_in
from peerlm.ranks import Ranks
from peerlm.train.config import BudgetConfig, CheckpointConfig, DataConfig, TrainConfig
from peerlm.train.precision import has_bf16_products
from peerlm.train.recipe import plain_values
from peerlm.train.run_folder import Resume

BACKGROUND = "background"
"""What tables call the text that the model was trained on."""
DEFAULT_BUDGET = BudgetConfig(tokens=120_000)
"""Of a stage, where neither the configuration nor the method has one."""
WINDOWS_PER_PASS = 8
_BEFORE = "before.json"
FREE = ("run", "data", "checkpoint_every", "checkpoint_minutes")
"""Settings that a resumed stream may change: weights do not depend on them."""

Measure = Callable[[PreTrainedModel, PreTrainedTokenizerFast], dict[str, Any]]


def learn(
    config: LearnConfig, *, resume: Resume = False, progress: bool = True, measure: Measure | None = None
) -> list[dict[str, Any]]:
    """Learn the stages of a configuration, in order, into the folder `config.run`.

    It gets config.json, data/ (the texts as tokens), and for each stage stages/NUMBER-NAME/ with log.jsonl, what the
    method leaves (model/, or pack/), and summary.json; then rows.json and table.md. With `resume` a stream continues
    from its newest checkpoint. Its weights become bit for bit those of a stream never interrupted, given the
    same number of threads and a budget other than minutes.

    Args:
        config: what is learned and how.
        resume: whether `config.run` is a stream to resume; otherwise it must not exist or be empty. "auto": resume
            where there is a stream, start where there is none.
        progress: whether to show a bar (on a terminal) or lines (elsewhere) on stderr.
        measure: called with the model, in evaluation mode, and its tokenizer before and after each stage; its figures
            join the row.

    Returns:
        The rows: that of the model before ("stage" is None; "document_start" is what begins each document and window,
        or None; "precision" that of matrix products in training), then one for each stage. A row has "perplexity" by
        domain, and what the stage took: "steps", "tokens" (of new text), "flops", "seconds", "trained_parameters",
        "peak_memory_bytes" (`train.loop.peak_memory_bytes`).

    Raises:
        UserError: a setting, text, model or folder that cannot be used; a new folder is removed where no stage has
            begun.
        TrainingStopped: told to stop by a signal, or the loss or a gradient was not finite.

    Warns:
        PeerlmWarning: what a text is measured on holds documents of a text that is trained on.
    """
    folder = Path(config.run)
    if resume == "auto":
        resume = (folder / "config.json").is_file()
    _check_folder(config, folder, resume=resume)
    try:
        return _Stream(config, progress=progress, measure=measure).run()
    except UserError:
        if not resume and not any(folder.glob("stages/*/log.jsonl")):
            rmtree(folder, ignore_errors=True)  # so that the same command works once the mistake is fixed
        raise


class _Stream:
    def __init__(self, config: LearnConfig, *, progress: bool, measure: Measure | None) -> None:
        self.config, self.progress, self.measure = config, progress, measure
        self.folder = Path(config.run)
        self.stages = config.stages
        self.method = method_of(config.method, config.settings)
        self.base = model_folder(config.model)
        _check_stages(self.stages)
        model, self.tokenizer = self.method.load(self.base, [])
        self.method.check(model, config.model)
        for stage in self.stages:
            self.method.check_name(stage.name)
        self.defaults = self.method.defaults(model)
        self.context = config.context if config.context is not None else self._default_context(model)
        check_context(model, self.context)
        retention = config.memory
        if (retention.kl or retention.replay) and not retention.background:
            raise UserError("--kl and --replay need text like that of the base model: give --background FILE")
        self.device = device_of(model)
        self.ranks = Ranks(rank=0, world_size=1, device=self.device)
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_partials(self.folder)
        write_json(self.folder / "config.json", asdict(config))
        self.texts = self._read_texts()
        given = {
            "stage": None,
            "document_start": marked(self._marks().window_start, self.tokenizer),
            "precision": self._precision(),
        }
        self.first = self._read_or_make(self.folder / _BEFORE, lambda: {**given, **self._measure(model)})

    def run(self) -> list[dict[str, Any]]:
        """All stages; see `learn`."""
        rows = [self.first]
        done: list[Path] = []
        for number, stage in enumerate(self.stages):
            folder = self.folder / "stages" / f"{number + 1}-{stage.name}"
            summary = folder / "summary.json"
            rows.append(self._read_or_make(summary, lambda: self._learn(number, stage, folder, done)))  # noqa: B023
            rmtree(folder / "checkpoints", ignore_errors=True)
            done.append(folder)
        write_json(self.folder / "rows.json", {"rows": rows})
        write_bytes(self.folder / "table.md", markdown_matrix(rows).encode())
        write_json(self.folder / "report.json", before_and_after(rows))
        return rows

    def _learn(self, number: int, stage: StageConfig, folder: Path, done: list[Path]) -> dict[str, Any]:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        for place in (folder, folder / "checkpoints"):
            remove_partials(place)
        config = self.config
        model, tokenizer = self.method.load(self.base, done)
        keep_start(tokenizer, self._marks(), marks_in(self.base, self.tokenizer))
        before = None
        if config.memory.kl:
            before, _ = self.method.load(self.base, done)
        where = Stage(
            name=stage.name,
            folder=folder,
            seed=config.seed + number,
            earlier=self._earlier(number),
            new=self.texts[stage.name].train,
            start=self._marks().start,
            bf16=self.first.get("precision") == "bf16",
            progress=self.progress,
        )
        torch.manual_seed(where.seed)
        lesson = Lesson(
            config=self._train_config(folder, len(self.texts[stage.name].train)),
            retention=config.memory,
            method=self.method,
            stage=where,
            model=self.method.prepare(model, where),
            before=before,
            text=self.texts[stage.name],
        )
        found = self.method.found(lesson.model, where)
        took = learn_stage(lesson, self.ranks, progress=self.progress)
        model = self.method.finish(lesson.model)
        model.eval()
        self.method.save(model, tokenizer, where)
        return {"stage": stage.name, **self._measure(model), **took, **found}

    def _default_context(self, model: PreTrainedModel) -> int:
        trained = trained_context(self.config.model)
        if trained is not None:
            return trained
        found = default_context(self.config.model, model)
        return found if self.defaults.context is None else min(found, self.defaults.context)

    def _precision(self) -> str:
        if self.config.precision != "auto":
            return self.config.precision
        return "bf16" if self.defaults.bf16 and has_bf16_products(self.device) else "fp32"

    def _marks(self) -> Marks:
        """What begins and ends a document of the texts."""
        return marks_in(self.base, self.tokenizer, self.config.document_start)

    def _train_config(self, folder: Path, windows: int) -> TrainConfig:
        config, defaults = self.config, self.defaults
        budget = config.budget or DEFAULT_BUDGET
        if config.budget is None and defaults.epochs is not None:
            steps = max(1, round(defaults.epochs * windows / config.batch_size))
            budget = BudgetConfig(tokens=steps * config.batch_size * self.context)
        optim = replace(config.optim, table_lr_multiplier=config.optim.table_lr_multiplier * defaults.table_rate)
        if self.method.lazy:
            optim = replace(optim, tables="lazy")
        return TrainConfig(
            run=str(folder),
            data=DataConfig(
                folder=str(folder),
                context=self.context,
                batch_size=config.batch_size,
                micro_batch_size=defaults.micro_batch_size,
            ),
            budget=budget,
            optim=optim,
            precision=self.first.get("precision", "fp32"),  # as it began, on whatever processor it is resumed
            checkpoint=CheckpointConfig(every=config.checkpoint_every, minutes=config.checkpoint_minutes, keep=1),
            seed=config.seed,
        )

    def _earlier(self, number: int) -> ReplayBuffer | None:
        """The background, and what is remembered of the stages before this one."""
        retention = self.config.memory
        texts: list[tuple[Windows, int | None]] = []
        if BACKGROUND in self.texts:
            texts.append((self.texts[BACKGROUND].train, None))
        if retention.remember:
            texts += [(self.texts[stage.name].train, retention.remember) for stage in self.stages[:number]]
        return ReplayBuffer(texts, self.config.seed) if texts else None

    def _read_texts(self) -> dict[str, Text]:
        retention = self.config.memory
        sources = {stage.name: (stage.text, stage.heldout) for stage in self.stages}
        if background := retention.background or self.defaults.background:
            sources = {BACKGROUND: (background, retention.heldout), **sources}
        data = Path(self.config.data) if self.config.data else self.folder / "data"
        texts = {
            name: read_text(
                files,
                heldout,
                data / name,
                tokenizer=self.tokenizer,
                tokenizer_folder=self.base,
                context=self.context,
                document_start=self.config.document_start,
                progress=self.progress,
            )
            for name, (files, heldout) in sources.items()
        }
        if not (self.folder / _BEFORE).exists():  # a resumed stream was told when it began
            warn_of_overlap(sources, data)
        return texts

    def _measure(self, model: PreTrainedModel) -> dict[str, Any]:
        limits = [each for each in (self.config.heldout_windows, self.defaults.heldout_windows) if each is not None]
        per_pass = self.defaults.micro_batch_size or WINDOWS_PER_PASS
        limit = min(limits, default=None)
        losses = {}
        with progress_bar(shown=self.progress) as bar:
            for name, text in self.texts.items():
                task = bar.add_task(f"measuring {name}", total=windows_read(text.heldout, limit))
                advance = partial(_advance, bar, task)
                losses[name] = held_out_loss(model, text.heldout, batch_size=per_pass, limit=limit, watch=advance)
        figures = {"loss": losses, "perplexity": {name: exp(loss) for name, loss in losses.items()}}
        return figures | (self.measure(model, self.tokenizer) if self.measure else {})

    @staticmethod
    def _read_or_make(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if not path.is_file():
            write_json(path, make())
        row: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return row


def before_and_after(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By text, its held-out loss in nats per token before the first and after the last stage, and the change in %."""
    first, last = rows[0]["loss"], rows[-1]["loss"]
    return {
        text: {"before": first[text], "after": last[text], "change_percent": 100 * (last[text] / first[text] - 1)}
        for text in first
    }


def markdown_matrix(rows: Sequence[Mapping[str, Any]]) -> str:
    """Perplexities of rows of `learn` in Markdown: a row for each stage, a column for each domain."""
    domains = list(rows[0]["perplexity"])
    lines = ["| after | " + " | ".join(domains) + " |", "|---" * (len(domains) + 1) + "|"]
    for row in rows:
        cells = (f"{row['perplexity'][domain]:,.2f}" for domain in domains)
        lines.append(f"| {row['stage'] or 'nothing'} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _advance(bar: Progress, task: TaskID, indices: Sequence[int], nats: Tensor, real: Tensor) -> None:
    """What `held_out_loss` calls after each pass."""
    bar.update(task, advance=len(indices))


def _check_stages(stages: Sequence[StageConfig]) -> None:
    names = [stage.name for stage in stages]
    if not names:
        raise UserError("there is nothing to learn: name a text, --text FILE")
    for name in names:
        if names.count(name) > 1 or name == BACKGROUND:
            raise UserError(
                f"two texts would be called {name!r} in tables and folders: rename one of the files, or give names, "
                "--text NAME=FILE"
            )


def _check_folder(config: LearnConfig, folder: Path, *, resume: bool) -> None:
    """Require an empty folder, or this same stream when resuming."""
    if not resume:
        if folder.exists() and (not folder.is_dir() or any(not is_partial(path) for path in folder.iterdir())):
            raise UserError(f"{folder} exists already: --resume it, or choose another --output")
        return
    if not (folder / "config.json").is_file():
        raise UserError(f"there is nothing to resume in {folder}: leave out --resume to start")
    before = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    now = json.loads(json.dumps(asdict(config)))
    default = {each.name: each.default for each in fields(LearnConfig)}  # a stream may be older than a setting
    known = json.loads(json.dumps(plain_values(config)))
    for key in now:
        was = before.get(key, default.get(key))
        if isinstance(was, dict) and isinstance(now[key], dict):  # or than a setting of a section
            was = {name: value for name, value in now[key].items() if name not in known[key]} | was
        if key not in FREE and was != now[key]:
            raise UserError(
                f"cannot resume {folder}, for {key} was {shortened(repr(before.get(key)))}, now "
                f"{shortened(repr(now[key]))}: give what it was started with, or choose another --output"
            )
