"""Processes that have imported nothing of transformers, of peft or of ours, from one that has what these import.

Torch and what it compiles with take seconds to import. A server does this once and forks for each program. Where a
process must have imported nothing at all, start an interpreter.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

_SERVER = """
import importlib, json, os, sys, traceback
for name in ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "accelerate", "jinja2.sandbox",
             "huggingface_hub.utils", "scipy.optimize"):
    importlib.import_module(name)
assert not {"transformers", "peft", "peerlm"} & sys.modules.keys()

def become(code, folder, arguments, files):
    os.chdir(folder)
    for stream, path in enumerate(files):
        os.dup2(os.open(path, os.O_RDWR), stream)
    sys.argv[1:] = arguments
    status = 1
    try:
        exec(code, {"__name__": "__main__"})
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

for line in sys.stdin:
    process = os.fork()
    if process == 0:
        become(*json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


def python(code: str, folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """What `python -c CODE ARGUMENTS...` does in a folder, with no standard input."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as temporary:
        out, error = (Path(temporary) / name for name in ("stdout", "stderr"))
        out.touch()
        error.touch()
        files = [os.devnull, str(out), str(error)]
        server.stdin.write(json.dumps([code, str(folder), arguments, files]) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess([code, *arguments], status, out.read_text(), error.read_text())


@cache
def _server() -> "subprocess.Popen[str]":
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/"
    )
    atexit.register(server.kill)
    return server
