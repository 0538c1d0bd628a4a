"""The Python of every document runs: each document's blocks in order, in one piece, in an empty folder."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
DOCUMENTS = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "index.md")]
TUTORIALS = [path for path in DOCUMENTS if BLOCK.search(path.read_text(encoding="utf-8"))]


def test_there_are_tutorials() -> None:
    assert {"README.md", "train.md", "convert.md", "evaluate.md", "huggingface.md"} <= {path.name for path in TUTORIALS}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # others' packages warn of their own affairs
@pytest.mark.parametrize("document", TUTORIALS, ids=lambda path: path.stem)
def test_blocks_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    for name, value in alone.items():  # what torchrun says to one process
        monkeypatch.setenv(name, str(value))
    scope: dict[str, Any] = {}
    try:
        for block in BLOCK.findall(document.read_text(encoding="utf-8")):
            exec(compile(block, str(document), "exec"), scope)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
