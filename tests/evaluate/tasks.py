"""Task files of lm-eval for tests."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


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
