"""What travels with the checkout to a machine without a network: packages in pure Python, and the commit's name."""

import shutil
import subprocess
import sys

from machine import PACKAGES, ROOT, commit

PURE = ("PEER-pytorch", "einops", "einx", "frozendict")
"""The package that is compared with, and what it needs besides torch and what comes with torch."""


def prepare() -> str:
    """Put them below build/gpu, from the package index that pip is told of; returns the folder, relative."""
    shutil.rmtree(PACKAGES, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    target = PACKAGES / "packages"
    subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), "--no-deps", "--target", str(target), *PURE], check=True)
    (PACKAGES / "COMMIT").write_text(commit() + "\n")
    if compiled := [str(file) for file in target.rglob("*.so")]:
        raise SystemExit(f"these are not pure Python, so that they may not run elsewhere: {', '.join(compiled)}")
    return str(PACKAGES.relative_to(ROOT))
