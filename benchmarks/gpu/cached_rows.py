"""Tables whose rows stay on the host while the card has places for some: bits of a table in memory, and step times."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from contenders import check_backend
from report import Report
from timing import Case
from torch import Tensor

from peerlm.layers import ExpertTable
from peerlm.layers.mapped.cached import cache_tables
from peerlm.layers.mapped.place import RowPlace
from peerlm.layers.mapped.table import mapped_in
from peerlm.layers.table import tables_as
from peerlm.optim import RowAdamW

MODES: dict[str, tuple[str, dict[str, object]]] = {
    "lazy, bfloat16": ("bfloat16", {"lazy": True, "row_wise": True}),
    "fused, bfloat16": ("bfloat16", {"lazy": True, "row_wise": True, "fused": True}),
    "exact, float32": ("float32", {}),
}
"""Row format, and settings of the optimizer."""
_TOKENS = 1024
_SMALLER = 4
"""How many times fewer rows the checks of bits have than what is timed."""


def run(report: Report) -> None:
    """For each optimizer the bits; then steps, beside those of a table in memory."""
    for backend, mode in [*(("triton", mode) for mode in MODES), ("reference", "lazy, bfloat16")]:
        label = f"{backend}, rows in places, {mode}: bits of a table in memory"
        report.check(label, lambda backend=backend, mode=mode: _bits(report, backend, mode))
    with _place() as place:
        kept: list[_Training] = []

        def build(places: bool) -> Case:
            where = place if places else None
            kept.append(_Training(report, where, "triton", "lazy, bfloat16", report.sizes.model_experts))
            return kept[-1].step

        figures = {"tokens": _tokens(report), "rows": report.sizes.model_experts}
        report.time(
            "step",
            {"peerlm, in memory": lambda: build(False), "peerlm, rows in places": lambda: build(True)},
            seconds=6,
            **figures,
        )
        if len(kept) == 2:
            report.row("step, entries found on the card", **kept[-1].found(), **figures)


@contextmanager
def _place() -> Iterator[RowPlace]:
    place = RowPlace.for_a_while()
    try:
        yield place
    finally:
        place.close()


def _tokens(report: Report) -> int:
    return min(_TOKENS, report.sizes.tokens)


class _Training:
    """A table of experts, half of whose rows have places where a `RowPlace` is given, and steps on ids as by Zipf."""

    def __init__(self, report: Report, place: RowPlace | None, backend: str, mode: str, num_rows: int):
        check_backend(backend)
        row_format, settings = MODES[mode]
        sizes, device = report.sizes, report.device
        draw = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        with tables_as(ExpertTable if place is None else mapped_in(place)):
            self.table = ExpertTable(num_rows, sizes.dim, backend=backend, row_format=row_format)
        if place is not None:
            cache_tables(self.table, device, num_rows // 2)
        self.table.to(device)
        self.optimizer = RowAdamW(self.table.parameters(), lr=1e-3, weight_decay=0.1, **settings)
        shape = (_tokens(report), sizes.model_experts_per_head)
        order = torch.randperm(num_rows, generator=draw)
        self.ids = [
            order[(num_rows ** torch.rand(shape, generator=draw)).long() - 1].to(device)
            for _ in range(sizes.optimizer_steps)
        ]
        dtype = torch.bfloat16 if row_format == "bfloat16" else torch.float32
        self.x = torch.randn(shape[0], sizes.dim, generator=draw).to(device, dtype)
        self.weights = torch.randn(shape, generator=draw).to(device, dtype)

    def step(self, turn: int) -> None:
        """Forward, backward, update."""
        y = self.table.mix(self.weights, self.ids[turn % len(self.ids)], self.x)
        y.float().square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def rows(self) -> Tensor:
        """All rows as they count, on the CPU."""
        return self.table.read().cpu()

    def found(self) -> dict[str, object]:
        """Of a table with places: which share of entries was there, and how many rows came and were written back."""
        cache = self.table._cache
        return {"share": round(cache.found / cache.asked, 4), "fetched": cache.fetched, "written": cache.written}


def _bits(report: Report, backend: str, mode: str) -> dict[str, object]:
    num_rows = report.sizes.model_experts // _SMALLER
    with _place() as place:
        trainings = [_Training(report, each, backend, mode, num_rows) for each in (place, None)]
        for turn in range(report.sizes.optimizer_steps):
            for training in trainings:
                training.step(turn)
        found, expected = (training.rows() for training in trainings)
        return {"ok": torch.equal(found, expected), **trainings[0].found()}
