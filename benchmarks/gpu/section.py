"""One section in this process; `run.py` starts it, and stops it where it takes too long."""

import argparse
import gc
import importlib
import json
import sys
from pathlib import Path

from machine import PACKAGES, ROOT
from sizes import SIZES


def main() -> None:
    """Parse, and call the section's function."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("module", help="its function is called with a Report")
    parser.add_argument("function")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--sizes", choices=SIZES, required=True)
    parser.add_argument("--every-row", type=json.loads, required=True, help="JSON that each row has")
    parser.add_argument("--until", type=float, required=True, help="deadline, as time.time() counts")
    options = parser.parse_args()
    sys.path.insert(1, str(ROOT / "src"))
    sys.path.append(str(PACKAGES / "packages"))  # last: some packages bring folders named "test" and "docs"

    import torch
    from report import Report

    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    torch.manual_seed(0)
    report = Report(
        options.name,
        options.rows,
        SIZES[options.sizes],
        options.every_row,
        until=options.until,
    )
    module = importlib.import_module(options.module)
    gc.collect()
    gc.freeze()  # what was imported stays: each of the many collections would go through all of it
    getattr(module, options.function)(report)


if __name__ == "__main__":
    main()
