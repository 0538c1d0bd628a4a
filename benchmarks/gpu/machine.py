"""What a row says of the machine: card, driver, versions, and the commit of peerlm."""

import datetime
import importlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ROOT / "build/gpu"
"""What travels with the checkout: pure packages that are compared with, and the commit's name. Ignored by git."""
NEEDED = {"numpy": (1,), "torch": (2, 11), "triton": (3, 6)}
"""Packages that a run needs, and their oldest versions."""

_MOST_SECONDS = 90
"""For torch to be imported and a card to be found, which a driver that hangs never does."""


def commit() -> str:
    """The commit of this checkout, "+changes" where files differ from it; of a copy without git what was noted."""
    noted = PACKAGES / "COMMIT"
    if not (ROOT / ".git").exists():
        return noted.read_text().strip() if noted.is_file() else "unknown"
    try:
        name = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
        changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return noted.read_text().strip() if noted.is_file() else "unknown"
    return f"{name}+changes" if changed else name


def driver() -> str:
    """The version of the card's driver; empty where nothing says it."""
    try:
        found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.partition("\n")[0]


def description(environment: Mapping[str, str]) -> dict[str, object]:
    """What every row says, found out in a process of its own, which leaves nothing on the card.

    Raises:
        RuntimeError: a package is missing or too old, or the driver hangs; the message is a sentence that says which.
    """
    command = [sys.executable, str(Path(__file__))]
    try:
        found = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=_MOST_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(
            f"torch did not say within {_MOST_SECONDS} s which card there is: see if nvidia-smi answers"
        ) from error
    if found.returncode:
        raise RuntimeError((found.stderr.strip() or f"exit code {found.returncode}").splitlines()[-1])
    return json.loads(found.stdout)


def what_is_missing() -> str:
    """Which of the packages cannot be imported, or is too old, and what to do; empty where all are there."""
    for name, oldest in NEEDED.items():
        least = ".".join(map(str, oldest))
        fix = f"pip install '{name}>={least}'"
        try:
            found = importlib.import_module(name).__version__
        except ImportError as error:
            said = "is not installed" if getattr(error, "name", "") == name else f"cannot be imported ({error})"
            return f"{name} {said}, and this needs it: {fix}"
        if tuple(int(part) for part in re.findall(r"\d+", found)[: len(oldest)]) < oldest:
            return f"{name} is {found}, and this needs {least} or newer: {fix}"
    return ""


def _described() -> dict[str, object]:
    """Card, its memory, driver, versions, date."""
    import torch
    import triton

    found: dict[str, object] = {"card": "", "date": datetime.date.today().isoformat()}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found["card"] = card.name
        found["card_GiB"] = round(card.total_memory / 2**30, 1)
        found["multiprocessors"] = card.multi_processor_count
        found["driver"] = driver()
        found["cuda"] = torch.version.cuda or torch.version.hip
    else:
        found["machine"] = platform.machine()
    found["torch"] = torch.__version__
    found["triton"] = triton.__version__
    found["python"] = platform.python_version()
    return found


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()


if __name__ == "__main__":
    if missing := what_is_missing():
        sys.exit(missing)
    print(json.dumps(_described()))  # noqa: T201, for `description`
