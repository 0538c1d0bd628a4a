"""EleutherAI's lm-eval on the models of this package: its model class, and tasks from files.

`python -m peerlm.evaluate.harness` is lm-eval's own command with `--model peerlm` added; it needs the extra "eval".
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peerlm.errors import UserError, listed
from peerlm.evaluate.likelihood import check_context
from peerlm.evaluate.loading import default_context, load_model

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise UserError(f'tasks are run by lm-eval, which is not here ({error}): pip install "peerlm[eval]"') from error

YAML = (".yaml", ".yml")


@register_model("peerlm")
class PeerHarness(HFLM):
    """lm-eval's Hugging Face model over what `load_model` reads: runs, and saved models of any causal kind.

    Args:
        pretrained: the folder of a run or a saved model.
        max_length: tokens read at once; default: as trained.
        packs: folders of packs to load into it (`peerlm.packs.api`).
        options: as of `HFLM`, such as batch_size.
    """

    def __init__(
        self, pretrained: str | Path, max_length: int | None = None, packs: Sequence[str | Path] = (), **options: Any
    ):
        model, tokenizer = load_model(pretrained, packs)
        max_length = default_context(pretrained, model) if max_length is None else int(max_length)
        check_context(model, max_length)
        options = {key: value for key, value in options.items() if key != "device"}  # load_model has chosen it
        super().__init__(pretrained=model, tokenizer=tokenizer, max_length=max_length, **options)

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
        packs: as `load_model`.

    Returns:
        By task, a row ready for JSON: documents, and each metric of the task with its standard error where it has one.

    Raises:
        UserError: a model, task or setting that cannot be used; the message has its name and the mend.
    """
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    with _errors_alone():
        manager, names = _find_tasks(tasks)
        model = PeerHarness(path, max_length=context, batch_size=batch_size, packs=packs)
        try:
            results = simple_evaluate(
                model=model, tasks=names, task_manager=manager, limit=limit, num_fewshot=fewshot, log_samples=False
            )
        except OverflowError as error:
            raise UserError(
                f"a perplexity of {listed(names)} is too large to write; ask for bits_per_byte instead"
            ) from error
        except (UserError, OSError):
            raise
        except Exception as error:  # whatever templates, metrics and data raise
            raise UserError(f"lm-eval cannot run {listed(names)} ({_short(error)}); mend the task file") from error
    return {name: _row(results, name) for name in results["results"]}


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
    except Exception as error:  # whatever a YAML reader raises
        raise UserError(f"the task files of {listed(folders)} cannot be read ({_short(error)}); mend them") from error
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
    """Within this context lm-eval's log has errors alone."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def main() -> None:
    """lm-eval's own command."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
