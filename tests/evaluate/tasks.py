"""Task files of lm-eval for tests."""

import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..processes import run_module


def write_task(
    folder: Path,
    name: str,
    rows: Sequence[dict[str, Any]],
    kind: str,
    query: str,
    target: str,
    metric: str,
    choices: str | None = None,
) -> None:
    """Write a task and its data."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [
        f"task: {name}",
        "dataset_path: json",
        f"dataset_kwargs: {{data_files: {json.dumps(str(data))}}}",
        "test_split: train",
        f"output_type: {kind}",
        f"doc_to_text: {json.dumps(query)}",
        f"doc_to_target: {json.dumps(target)}",
        *([f"doc_to_choice: {json.dumps(choices)}"] if choices else []),
        f"metric_list: [{{metric: {metric}}}]",
    ]
    (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n")


def few_of_lm_evals_tasks(folder: Path) -> str:
    """A place for lm-eval's module, beside which it looks for its own tasks: reading all 10,000 takes seconds."""
    own = Path(str(importlib.util.find_spec("lm_eval.tasks").origin)).parent
    shutil.copytree(own / "swag", folder / "swag", dirs_exist_ok=True)
    return str(folder / "manager.py")


def command_with_few_tasks(place: str, arguments: list[str]) -> None:
    """What `python -m peerlm.evaluate.harness ARGUMENTS...` does."""
    importlib.import_module("lm_eval.tasks.manager").__file__ = place
    run_module("peerlm.evaluate.harness", arguments)
