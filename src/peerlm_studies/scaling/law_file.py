"""The file of a law: what `peerlm scaling` writes, and the one that comes with the package."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peerlm.errors import UserError

DEFAULT_LAW = Path(__file__).with_name("law.json")
"""The law that comes with the package: the one of docs/results.md."""


def rows_digest(files: Sequence[str | Path]) -> str:
    """Of the files that a law was fitted to, so that a report can tell whether it still is theirs."""
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:16]


def read_law(path: Path) -> dict[str, Any]:
    """What `scaling` wrote; raises UserError where it is not that."""
    if not path.is_file():
        raise UserError(f"there is no law at {path}: make one with `peerlm scaling`, and name it with --law")
    try:
        law = json.loads(path.read_text(encoding="utf-8"))
        assert {"files", "digest"} <= law.keys()
        assert all({"constants", "bootstrap", "ranges", "model"} <= fit.keys() for fit in law["methods"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(f"{path} is no law of `peerlm scaling`: name the file that it wrote") from error
    return dict(law)
