"""Run our models in vLLM itself, without a GPU, and compare its tokens with those of `generate`.

    python foreign/vllm/run.py [--folder build/foreign/vllm] [MODEL ...]

Makes an environment of its own below the folder: 4 GB on the disk, and a quarter of an hour for the first time. pip
takes packages from where it is set up to. torch must be its build for CPUs, which PyPI does not have for Linux on x86:
PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL says where it is. vLLM is built from its source without its compiled part;
`operators.py` stands in for the seven of its operators that are called. Needs Linux and Python 3.11 or newer. Exit code
0: all texts are those of `generate`.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
VLLM = "0.33.0"
TORCH = "2.13.0"
NUMBA = "0.65.0"
"""What vLLM asks for on CPUs."""
BUILD = (
    "cmake",
    "jinja2",
    "nanobind",
    "ninja",
    "packaging",
    "scikit-build-core",
    "setuptools>=77,<81",
    "setuptools-rust",
)
"""What builds vLLM and peerlm."""
LEFT_OUT = re.compile(r"(opencv|certifi)\b")
"""Requirements that are not installed as vLLM has them: OpenCV is for videos, certifi may be older."""


def environment(folder: Path) -> Path:
    """The Python of an environment with vLLM and peerlm, made where it is not there; peerlm is installed each time."""
    python, done = folder / "env" / "bin" / "python", folder / "done"
    base = os.environ | {"VLLM_TARGET_DEVICE": "empty", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

    def pip(*arguments: str | Path, version: str = VLLM) -> None:
        command = [python, "-m", "pip", "--quiet", *arguments]
        subprocess.run(command, check=True, env=base | {"VLLM_VERSION_OVERRIDE": version})

    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder / "env", with_pip=True)
        pip("install", f"torch=={TORCH}", "setuptools_scm", "numpy", *BUILD)
        pip("download", "--no-deps", "--no-build-isolation", "--no-binary", "vllm", f"vllm=={VLLM}", "--dest", folder)
        with tarfile.open(folder / f"vllm-{VLLM}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
        source = folder / f"vllm-{VLLM}"
        # vLLM takes itself for its build for CPUs by this version.
        pip("install", "--no-deps", "--no-build-isolation", source, version=f"{VLLM}+cpu")
        lines = (source / "requirements" / "common.txt").read_text(encoding="utf-8").splitlines()
        common = folder / "common.txt"
        common.write_text("\n".join(line for line in lines if not LEFT_OUT.match(line)) + "\n", encoding="utf-8")
        pip("install", f"torch=={TORCH}", f"numba=={NUMBA}", "certifi", "-r", common)
        shutil.rmtree(source)
        done.touch()
    pip("install", "--no-build-isolation", ROOT)
    (installed,) = (folder / "env" / "lib").glob("python*/site-packages/vllm")
    for name in ("_C", "_C_AVX2", "_C_AVX512"):  # which one is imported depends on the processor
        shutil.copyfile(HERE / "operators.py", installed / f"{name}.py")
    return python


def main() -> int:
    """Make the environment, run the comparison in it; returns its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "foreign" / "vllm", help="of the environment")
    parser.add_argument("models", nargs="*", metavar="MODEL", help="names in identity.py; default: all")
    options = parser.parse_args()
    if sys.version_info < (3, 11) or sys.platform != "linux":
        sys.exit(
            f"vLLM {VLLM} needs Linux and Python 3.11 or newer, and this is {sys.platform}, {sys.version.split()[0]}"
        )
    python = environment(options.folder.resolve())
    return subprocess.run([python, HERE / "identity.py", *options.models], cwd=options.folder).returncode


if __name__ == "__main__":
    sys.exit(main())
