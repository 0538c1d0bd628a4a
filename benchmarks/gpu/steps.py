"""Training steps as `peerlm train` makes them, by its own code: gradients, clipping, measures, update; or as graphs."""

import importlib.util
import math
import sys
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from machine import ROOT
from torch import Tensor, nn

from peerlm.optim import clip_gradients, keep_learning_rates_on


def _by_file(name: str) -> ModuleType:
    """A module of peerlm.train; the package around it needs more than torch."""
    full = f"peerlm_train_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, ROOT / f"src/peerlm/train/{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[full] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[full])
    return sys.modules[full]


if importlib.util.find_spec("safetensors") is None:
    # peerlm.parallel needs it; of that, steps of one process call this alone
    sys.modules["peerlm.parallel"] = ModuleType("peerlm.parallel")
    sys.modules["peerlm.parallel"].unsynchronised = nullcontext  # type: ignore[attr-defined]
captured = _by_file("captured")
_measures, _step = _by_file("measures"), _by_file("step")


class TrainSteps:
    """Steps of a model on batches of one shape.

    Args:
        model: called with input_ids, labels and use_cache, as a language model of transformers; gives `.loss`.
        optimizer: RowAdamW or torch's AdamW.
        device: of the model.
        graph: whether steps are captured in a graph, once some were eager.
        micro_batches: into which a batch is split.
        table_max_norm: of `clip_gradients`; infinite where the backward pass updates tables.
        precision: of autocast; None: there is none.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: str,
        *,
        graph: bool,
        micro_batches: int = 1,
        table_max_norm: float = 1.0,
        precision: torch.dtype | None = None,
    ) -> None:
        self.model, self.optimizer, self.device = model, optimizer, torch.device(device)
        self.micro_batches, self.table_max_norm, self.precision = micro_batches, table_max_norm, precision
        self.measures = _measures.Measures(self.device)
        if captured.runs_ahead(self.device):
            keep_learning_rates_on(self.device, optimizer)
        obstacle = "" if graph and self.device.type in captured.GRAPHS else "no graph is asked for, or there is none"
        self.steps = captured.Steps(self.device, optimizer, obstacle)
        self._number = 0

    def make(self, batch: Tensor) -> None:
        """One step, of which nobody waits for the end."""
        self._number += 1
        self.measures.count_step(self._number, math.nan)
        self.steps.make("step", batch, self._train_on)

    def _train_on(self, batch: Tensor) -> None:
        loss = _step.accumulate_gradients(
            self.model,
            batch,
            micro_batch_size=math.ceil(len(batch) / self.micro_batches),
            autocast=self._autocast,
        )
        norms = clip_gradients(self.optimizer.param_groups, max_norm=1.0, table_max_norm=self.table_max_norm)
        self.measures.add({"loss": loss, "norm": norms.of_rest, "table norm": norms.of_tables})
        self.optimizer.step()

    def _autocast(self) -> AbstractContextManager[None]:
        return nullcontext() if self.precision is None else torch.autocast(self.device.type, dtype=self.precision)
