"""Which meshes of a number of GPUs hold tables, what each costs, and what would fit where none does."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from peerlm.errors import UserError, listed
from peerlm.parallel.cost import GPUS, MOMENT_COLUMNS, ROW_BYTES, Gpu, Shape, Tables, memory, seconds, step_bytes

USABLE = 0.9
"""Share of a GPU's memory that a plan fills; the rest is for the runtime and fragments."""
MOST_GPUS = 2**16
MOST_NUMBERED = 2**31
"""Kernels number what a GPU holds in 32 bits: rows, or vectors where columns are cut."""


@dataclass(frozen=True, kw_only=True)
class MeshPlan:
    """A mesh, and what a step on it takes."""

    shape: Shape
    memory: dict[str, float]
    """Bytes of the fullest GPU by part."""
    received: dict[str, float]
    """Bytes that a GPU receives, over its tokens, by "network" and "nvlink"."""
    seconds: dict[str, float]
    """Of a step by what takes them."""
    obstacle: str
    """Why tables cannot be trained on it, in words; empty where they can."""

    @property
    def fits(self) -> bool:
        """Whether tables can be trained on it."""
        return not self.obstacle

    def row(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "replica": self.shape.replica,
            "cols": self.shape.cols,
            "rows": self.shape.rows,
            "fits": self.fits,
            "obstacle": self.obstacle,
            "memory_bytes": {**self.memory, "all": sum(self.memory.values())},
            "received_bytes_per_token": self.received,
            "seconds_per_step": {
                **self.seconds,
                "one after another": sum(self.seconds.values()),
                "all at once": max(self.seconds.values()),
            },
        }


def tables_of(num_experts: float, **settings: Any) -> Tables:
    """Tables of at least so many rows: the next square number.

    Raises:
        UserError: a setting out of range.
    """
    if not (math.isfinite(num_experts) and 1 <= num_experts <= 1e15):
        raise UserError(f"--num-experts {num_experts:g}: must be 1 to 1e15")
    side = math.isqrt(math.ceil(num_experts) - 1) + 1
    tables = Tables(num_rows=side * side, **settings)
    for name, value in asdict(tables).items():
        least = 0 if name == "dense_parameters" else 1
        if type(value) is int and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if tables.row_format not in ROW_BYTES:
        raise UserError(f"--row-format {tables.row_format!r}: choose from {listed(ROW_BYTES)}")
    if tables.per_head > tables.num_rows:
        raise UserError(f"--experts-per-head {tables.per_head}: there are only {tables.num_rows} experts")
    if tables.row_format == "bfloat16" and tables.dim % MOMENT_COLUMNS:
        raise UserError(f"--dim {tables.dim}: with --row-format bfloat16 it must be a multiple of {MOMENT_COLUMNS}")
    return tables


def gpu_named(name: str) -> Gpu:
    """The GPU of this name; raises UserError where there is none."""
    if name.lower() not in GPUS:
        raise UserError(f"--gpu {name!r}: choose from {listed(GPUS)}")
    return GPUS[name.lower()]


def plan_meshes(tables: Tables, gpus: int, gpu: Gpu, *, per_node: int = 8) -> list[MeshPlan]:
    """What each mesh ("replica", "cols", "rows") of the GPUs takes: those that fit first, then the fastest.

    Raises:
        UserError: a number of GPUs out of range.
    """
    if not 1 <= gpus <= MOST_GPUS:
        raise UserError(f"--gpus {gpus}: must be 1 to {MOST_GPUS:,}")
    if per_node < 1:
        raise UserError(f"--gpus-per-node {per_node}: must be at least 1")
    found = [_plan(tables, shape, gpu) for shape in _shapes(tables, gpus, per_node)]
    return sorted(found, key=lambda plan: (not plan.fits, sum(plan.seconds.values())))


def what_would_fit(tables: Tables, gpus: int, gpu: Gpu, *, per_node: int = 8) -> list[tuple[str, MeshPlan]]:
    """Changes, in words, each with the best mesh that it allows: of settings, of GPUs, of the number of experts."""
    found = []
    lean = replace(tables, row_format="bfloat16", fused=True)
    settings = [("--fused", replace(tables, fused=True)), ("--row-format bfloat16 --fused", lean)]
    for words, changed in settings:
        if changed != tables:
            found += _fitting(words, changed, gpus, gpu, per_node)
    for words, changed in (("", tables), (" --row-format bfloat16 --fused", lean)):
        if words and changed == tables:
            continue
        more = 2 * gpus
        best: list[tuple[str, MeshPlan]] = []
        while more <= MOST_GPUS and not best:
            best = _fitting(f"--gpus {more}{words}", changed, more, gpu, per_node)
            more *= 2
        found += best
    low, high = 0, math.isqrt(tables.num_rows)
    least = math.isqrt(tables.per_head - 1) + 1
    while high - low > 1:  # low fits, high does not
        side = (low + high) // 2
        fits = side < least or _fits(replace(tables, num_rows=side * side), gpus, gpu, per_node)
        low, high = (side, high) if fits else (low, side)
    if low >= least:
        found += _fitting(f"--num-experts {low * low}", replace(tables, num_rows=low * low), gpus, gpu, per_node)
    return found


def _fitting(words: str, tables: Tables, gpus: int, gpu: Gpu, per_node: int) -> list[tuple[str, MeshPlan]]:
    """The best mesh with the words, or nothing where none fits."""
    if not _fits(tables, gpus, gpu, per_node):
        return []
    best = plan_meshes(tables, gpus, gpu, per_node=per_node)[0]
    return [(words, best)]


def _fits(tables: Tables, gpus: int, gpu: Gpu, per_node: int) -> bool:
    return any(not _obstacle(tables, shape, gpu) for shape in _shapes(tables, gpus, per_node))


def _obstacle(tables: Tables, shape: Shape, gpu: Gpu) -> str:
    if sum(memory(tables, shape).values()) > USABLE * gpu.memory:
        return "memory"
    vectors = -(-tables.num_rows // shape.rows) * (tables.vectors if shape.cols > 1 else 1)
    return "2^31 rows or more on a GPU" if vectors >= MOST_NUMBERED else ""


def _shapes(tables: Tables, gpus: int, per_node: int) -> Iterator[Shape]:
    """The meshes that training takes.

    Columns are cut evenly, each GPU has whole blocks of second moments, and what is `fused` has one copy.
    """
    block = MOMENT_COLUMNS if tables.row_format == "bfloat16" else 1
    for replica in (1,) if tables.fused else _divisors(gpus):
        of_copy = gpus // replica
        for cols in _divisors(of_copy):
            if tables.dim % cols == 0 and tables.dim // cols % block == 0:
                yield Shape(replica=replica, cols=cols, rows=of_copy // cols, per_node=per_node)


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def _plan(tables: Tables, shape: Shape, gpu: Gpu) -> MeshPlan:
    received = {link: size / tables.tokens for link, size in step_bytes(tables, shape).items()}
    return MeshPlan(
        shape=shape,
        memory=memory(tables, shape),
        received=received,
        seconds=seconds(tables, shape, gpu),
        obstacle=_obstacle(tables, shape, gpu),
    )
