"""The Python of docs/convert.md runs, in one piece."""

import re
from pathlib import Path
from typing import Any


def test_the_blocks_run_in_order() -> None:
    text = (Path(__file__).parents[2] / "docs" / "convert.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    scope: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/convert.md", "exec"), scope)
    assert scope["neurons"].down.shape == (64, 32)
