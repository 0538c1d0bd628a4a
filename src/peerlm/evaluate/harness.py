"""EleutherAI's lm-eval on the models of this package: its model class, and tasks from files.

`python -m peerlm.evaluate.harness` is lm-eval's own command with `--model peerlm` added; it needs the extra "eval".
"""

import copy
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]

from peerlm.chat import check_chat
from peerlm.data.encoder import TextEncoder
from peerlm.data.tokenizer import begin_with
from peerlm.errors import UserError, listed
from peerlm.evaluate.likelihood import check_context
from peerlm.evaluate.loading import default_context, load_model
from peerlm.evaluate.notes import notes_on
from peerlm.evaluate.perplexity import score_documents
from peerlm.evaluate.sample import plain_configuration
from peerlm.marks import AUTO, marked, marks_of

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise UserError(f'tasks are run by lm-eval, which is not here ({error}): pip install "peerlm[eval]"') from error

YAML = (".yaml", ".yml")
IN_A_CHAT = {"document_start": None, "start_from": "the chat template"}
"""What a row says of where its questions begin, if they are messages of a chat."""


@register_model("peerlm")
class PeerHarness(HFLM):
    """lm-eval's Hugging Face model over what `load_model` reads: runs, and saved models of any causal kind.

    Texts begin as `peerlm.marks` says, once, and end without a mark; rolling log-likelihoods are those of
    `score_documents`. What tasks say of sampling is all that is used: neither transformers' choice among 50 tokens nor
    a saved generation_config.json.

    Args:
        pretrained: the folder of a run or a saved model.
        max_length: tokens read at once; default: as trained.
        packs: folders of packs to load into it (`peerlm.packs.api`).
        document_start: what stands before each text: "auto", "none" or a token.
        chat: whether questions come in the tokenizer's chat template, which then says what stands before them.
        device_rows: as `load_model`.
        options: as of `HFLM`, such as batch_size.

    Attributes:
        marks: what begins and ends a document.
        encoder: counts in its `loss` what the tokenizer loses of the texts.
    """

    def __init__(
        self,
        pretrained: str | Path,
        max_length: int | None = None,
        packs: Sequence[str | Path] = (),
        document_start: str = AUTO,
        chat: bool = False,
        device_rows: int = 0,
        **options: Any,
    ):
        model, tokenizer = load_model(pretrained, packs, device_rows=device_rows)
        if chat:
            check_chat(tokenizer, document_start)
        max_length = default_context(pretrained, model) if max_length is None else int(max_length)
        check_context(model, max_length)
        options = {key: value for key, value in options.items() if key != "device"}  # load_model has chosen it
        self.marks = marks_of(model, tokenizer, document_start)
        self.encoder = TextEncoder(tokenizer)
        added = tokenizer.added_tokens_decoder
        self._special = {token for token in added if added[token].special and token != tokenizer.unk_token_id}
        names = [str(added[token].content) for token in self._special]
        self._special_names = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")
        model.generation_config = plain_configuration(model.generation_config)
        if self.marks.start:
            options.setdefault("prefix_token_id", self.marks.start[-1])
        tokenizer = copy.deepcopy(tokenizer)
        begin_with(tokenizer, () if chat else self.marks.prompt_start)
        super().__init__(pretrained=model, tokenizer=tokenizer, max_length=max_length, **options)

    def tok_encode(self, string: str, *arguments: Any, **options: Any) -> list[int]:
        """As of `HFLM`; what the tokenizer loses is counted, of the text between special tokens."""
        ids: list[int] = super().tok_encode(string, *arguments, **options)
        plain = [token for token in ids if token not in self._special]
        self.encoder.account([self._special_names.sub("", string)], [plain], [False])
        return ids

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, read alone: what `peerlm eval` computes, with the longest stride."""
        texts = [request.args[0] for request in requests]
        documents = [self.encoder.encode([text], [False])[0] for text in texts]
        self.encoder.account(texts, documents, [False] * len(texts))
        nats = score_documents(
            self.model,
            [torch.tensor(document, dtype=torch.int64) for document in documents],
            self.marks,
            context=self.max_length,
            stride=self.max_length - len(self.marks.window_start),
            batch_size=int(self.batch_size),
        )
        for text, value in zip(texts, nats, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), -value)
        return [-value for value in nats]

    def _model_generate(self, *arguments: Any, **options: Any) -> torch.Tensor:
        if options.get("do_sample"):
            options.setdefault("top_k", 0)
        return super()._model_generate(*arguments, **options)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results: nothing that needs a network."""
        return {"model_num_parameters": self.model.num_parameters(), "model_dtype": str(self.model.dtype)}


def evaluate_tasks(
    path: str | Path,
    tasks: Sequence[str | Path],
    *,
    context: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    fewshot: int | None = None,
    packs: Sequence[str | Path] = (),
    device_rows: int = 0,
    document_start: str = AUTO,
    chat: bool = False,
    task_data: str | Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Run lm-eval's tasks with the model of a run or a saved model.

    Args:
        path: as `load_model`.
        tasks: files of lm-eval's task format, folders of such files, or names of lm-eval's own tasks, which fetch
            their data.
        context: tokens read at once; default: as trained.
        limit: documents of each task; default: all.
        batch_size: requests in a forward pass.
        fewshot: examples before each question; default: as the task says.
        packs, device_rows: as `load_model`.
        document_start: what stands before each text: "auto", "none" or a token (see `peerlm.marks`).
        chat: whether each question is a user's message of the tokenizer's chat template, and examples before it are
            earlier turns. Texts of rolling tasks are no questions, and stay.
        task_data: folder that relative names of data in task files start at; default: the working directory.

    Returns:
        By task, a row ready for JSON: documents, and each metric of the task with its standard error where it has one;
        document_start (the tokens as text, None for none), start_from (who says so); and as of `evaluate`, lost (of all
        tasks together) and notes.

    Raises:
        UserError: a model, task or setting that cannot be used; the message has its name and the fix.
    """
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    with _errors_alone():
        manager, names = _find_tasks(tasks)
        folder = Path.cwd() if task_data is None else Path(task_data)
        check_task_data([Path(file) for name in names if (file := manager.task_index[name].yaml_path)], folder)
        model = PeerHarness(
            path,
            max_length=context,
            batch_size=batch_size,
            packs=packs,
            document_start=document_start,
            chat=chat,
            device_rows=device_rows,
        )
        try:
            with _within(folder):
                results = simple_evaluate(
                    model=model,
                    tasks=names,
                    task_manager=manager,
                    limit=limit,
                    num_fewshot=fewshot,
                    apply_chat_template=chat,
                    log_samples=False,
                )
        except OverflowError as error:
            raise UserError(
                f"a perplexity of {listed(names)} is too large to write; ask for bits_per_byte instead"
            ) from error
        except (UserError, OSError):
            raise
        except Exception as error:  # anything that templates, metrics and data may raise
            raise UserError(f"lm-eval cannot run {listed(names)} ({_short(error)}); fix the task file") from error
    model.encoder.warn(f"the texts of {listed(names)}")
    more: dict[str, Any] = {}
    if lost := model.encoder.loss.shares:
        more["lost"] = lost
    if notes := notes_on(model.model, windows_per_pass=batch_size):
        more["notes"] = notes
    start = {"document_start": marked(model.marks.start, model.tokenizer), "start_from": model.marks.source}
    rows = {}
    for name in results["results"]:
        asked = chat and results["configs"].get(name, {}).get("output_type") != "loglikelihood_rolling"
        rows[name] = _row(results, name) | (IN_A_CHAT if asked else start) | more
    return rows


def _find_tasks(tasks: Sequence[str | Path]) -> tuple[TaskManager, list[str]]:
    """Where tasks are found, and their names."""
    files: list[Path] = []
    names: list[str] = []
    for task in tasks:
        given = Path(task)
        if given.is_dir():
            found = sorted(file for file in given.iterdir() if file.suffix in YAML)
            if not found:
                raise UserError(f"{task} has no task files; name a .yaml file or a folder of them")
            files += found
        elif given.suffix in YAML:
            if not given.is_file():
                raise UserError(f"{task} is not a file; name a task file, or a task of lm-eval's own")
            files.append(given)
        else:
            names.append(str(task))
    folders = sorted({str(file.resolve().parent) for file in files})
    try:
        manager = TaskManager(include_path=folders, include_defaults=bool(names))
    except Exception as error:  # anything that a YAML reader may raise
        raise UserError(f"the task files of {listed(folders)} cannot be read ({_short(error)}); fix them") from error
    by_file = {Path(entry.yaml_path).resolve(): name for name, entry in manager.task_index.items() if entry.yaml_path}
    for file in files:
        if file.resolve() not in by_file:
            raise UserError(
                f"{file} defines no task of its own; it needs a line `task: NAME`, with a name that no other file has"
            )
        names.append(by_file[file.resolve()])
    for name in names:
        if name not in manager.task_index:
            raise UserError(f"lm-eval knows no task {name!r}; name one of its own or a .yaml file")
    return manager, names


def check_task_data(files: Sequence[Path], folder: Path) -> None:
    """Raise UserError where a task file names data that are not in a folder; URLs and patterns are not looked for."""
    if not folder.is_dir():
        raise UserError(f"--task-data {folder} is not a folder: name the one with the data of the tasks")
    for file in files:
        try:
            config = yaml.load(file.read_text(encoding="utf-8"), Loader=_TaskLoader)
        except yaml.YAMLError:
            continue  # lm-eval says what is wrong
        named = ((config if isinstance(config, dict) else {}).get("dataset_kwargs") or {}).get("data_files") or []
        names = named.values() if isinstance(named, dict) else [named] if isinstance(named, str) else named
        for name in map(str, names):
            if "://" not in name and "*" not in name and not (folder / name).is_file():
                raise UserError(
                    f"{file} reads {name}, which is not in {folder}: name the folder that has it with --task-data"
                )


class _TaskLoader(yaml.SafeLoader):
    """Reads task files, whose functions do not matter here."""


_TaskLoader.add_multi_constructor("!", lambda loader, suffix, node: None)


@contextmanager
def _within(folder: Path) -> Iterator[None]:
    """Within this context relative names start at the folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _row(results: Any, name: str) -> dict[str, Any]:
    """Metrics of one task: lm-eval's "acc,none" is "acc" here."""
    row: dict[str, Any] = {}
    if counts := results.get("n-samples", {}).get(name):
        row["documents"] = counts["effective"]
    for key, value in results["results"][name].items():
        metric, _, which = key.partition(",")
        if isinstance(value, float):
            row[metric if which == "none" else f"{metric} ({which})"] = value
    return row


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


@contextmanager
def _errors_alone() -> Iterator[None]:
    """Within this context lm-eval's log has errors alone, and what it prints goes to stderr, beside our figures."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        log.setLevel(level)


def main() -> None:
    """lm-eval's own command."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
