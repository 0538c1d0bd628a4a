"""The numerical tests under every SIMD target of this machine: `python tests/targets.py [arguments of pytest]`."""

import os
import subprocess
import sys

from peerlm.ops.cpu import native


def run_tests(target: str, *arguments: str) -> tuple[int, str]:
    """Run tests marked `numerical` in a process whose kernels are those of `target`.

    Returns pytest's exit status and the last line that it printed, which counts the tests.
    """
    environment = os.environ | {"PEERLM_SIMD": target}
    named = [sys.executable, "-c", "from peerlm.ops.cpu import native; print(native.module.target())"]
    in_use = subprocess.run(named, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    assert in_use == target, (in_use, target)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "numerical", *arguments]
    line = ""
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or []:
            print(line, end="", flush=True)
    return process.returncode, line.strip()


def targets() -> list[str]:
    """What this machine runs, best first; empty without native kernels."""
    return native.module.runnable_targets().split(", ") if native.module else []


def main() -> int:
    """Run under every target, even where one failed, and say at the end which ran."""
    if not targets():
        print(native.description())
        return 1
    results = {}
    for target in targets():
        print(f"\nPEERLM_SIMD={target}", flush=True)
        results[target] = run_tests(target, *sys.argv[1:])
    print()
    for target, (status, line) in results.items():
        print(f"{target:12s} {'passed' if status == 0 else 'FAILED'}: {line}")
    return int(any(status for status, _ in results.values()))


if __name__ == "__main__":
    sys.exit(main())
