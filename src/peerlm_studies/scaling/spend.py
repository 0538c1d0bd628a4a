"""What a plan may spend, read and checked before anything is imported that takes seconds."""

import math
import re

from peerlm.errors import UserError

UNITS = {
    "": 1,
    "B": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "TB": 1e12,
}


def check_spend(flops: float, memory: float, row_bytes: float) -> None:
    """Raise UserError unless all are above 0, and the FLOPs finite."""
    for name, value in (("flops", flops), ("memory", memory), ("row-bytes", row_bytes)):
        if not value > 0 or (name == "flops" and math.isinf(value)):
            raise UserError(f"--{name} {value:g}: must be above 0{' and finite' if name == 'flops' else ''}")


def read_bytes(text: str, option: str = "--memory") -> float:
    """Bytes from a number with a unit, as in 80GiB or 500MB; raises UserError for anything else."""
    if text == "inf":
        return math.inf
    match = re.fullmatch(r"([0-9.eE+]+) ?([A-Za-z]*)", text.strip())
    try:
        assert match is not None
        return float(match.group(1)) * UNITS[match.group(2)]
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(f"{option} {text!r}: write a number of bytes with a unit, as in 80GiB or 500MB") from error
