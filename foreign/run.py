"""Run the tests of transformers or peft, as they were released, with our models and adapters.

`python foreign/run.py transformers` and `python foreign/run.py peft`. The tests are those of the pinned version, from
its source distribution, which pip downloads into build/foreign/. What transformers leaves out of that, its tests of
generation, needs a checkout of its repository at the same version: `--checkout FOLDER`.

Exit code 0: all passed, but for the exceptions that exceptions.toml lists with a reason each, and all of those failed.
"""

import argparse
import importlib.metadata
import os
import subprocess
import sys
import tarfile
from pathlib import Path

from packaging.requirements import Requirement

HERE = Path(__file__).parent
ROOT = HERE.parent
BUILD = ROOT / "build" / "foreign"
# What the tests that are in transformers' source distribution import of those that are not.
LEFT_OUT = {
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
}


def pinned(name: str) -> str:
    """The version in constraints.txt; exits where another one is installed."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    (pin,) = (each for each in pins if each.name == name and (each.marker is None or each.marker.evaluate()))
    version = next(iter(pin.specifier)).version
    installed = importlib.metadata.version(name)
    if installed != version:
        sys.exit(f"{name} {installed} is installed, but constraints.txt has {version}: run make setup")
    return version


def fetch(name: str, version: str) -> Path:
    """The folder of a source distribution with its tests, downloaded if it is not there."""
    folder = BUILD / f"{name}-{version}"
    if not folder.is_dir():
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*download, "--no-binary", name, f"{name}=={version}", "--dest", BUILD], check=True)
        (archive,) = BUILD.glob(f"{name}-{version}.tar.gz")
        with tarfile.open(archive) as files:
            tests = [each for each in files if each.name.startswith(f"{folder.name}/tests/")]
            files.extractall(BUILD, members=tests, filter="data")
    return folder


def main() -> int:
    """Run one suite; returns pytest's exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("suite", choices=["transformers", "peft"])
    parser.add_argument("--checkout", type=Path, help="repository of transformers at the pinned version")
    arguments, options = parser.parse_known_args()
    folder = arguments.checkout or fetch(arguments.suite, pinned(arguments.suite))
    if arguments.suite == "transformers" and arguments.checkout is None:
        for name, text in LEFT_OUT.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        print("without --checkout: transformers' tests of models, not those of generation")  # noqa: T201
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), str(folder / "utils"), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PEERLM_FOREIGN": str(BUILD),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-c", HERE / "pytest.ini", HERE / f"{arguments.suite}_suite.py"]
    return subprocess.run([*command, *options], env=environment, cwd=folder).returncode


if __name__ == "__main__":
    sys.exit(main())
