"""Sparse finetuning: in each step only the experts that its text uses more than other text does.

Lin et al. 2025 (arXiv 2510.15103) do so with the slots of a memory layer. An expert's score in a step is
TF * IDF = c_i / sum_j c_j * log((B + 1) / (b_i + 1)), with c_i its retrievals in the step. Of B windows of background
text, b_i is the number in which the starting model retrieves it.

Shape suffixes: N experts.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from peerlm.continual.method import Method, Stage, check_rows, freeze, peer_layers, train_with_fixed_statistics
from peerlm.continual.retention import ReplayBuffer
from peerlm.errors import UserError
from peerlm.evaluate.likelihood import device_of
from peerlm.evaluate.progress import progress_bar
from peerlm.files import write_bytes
from peerlm.layers import Table
from peerlm.layers.modes import evaluating
from peerlm.optim.restrict import restrict_gradient
from peerlm.usage import ExpertUsage, record_usage

FROZEN = ("keys", "query", "rest")
BACKGROUND_FILE = "background.safetensors"


def background_counts(model: nn.Module, windows: Iterable[Tensor]) -> tuple[dict[str, Tensor], int]:
    """In how many windows each expert is retrieved, (N,) int64 by name of the layer's index, and how many there are.

    windows: each (context,) int64.
    """
    counts: dict[str, Tensor] = {}
    number = 0
    with evaluating(model):
        for window in windows:
            with record_usage(model) as usage:
                model(input_ids=window[None].to(device_of(model)), use_cache=False)
            for name, layer in usage.items():
                found = (layer.retrievals_N > 0).long()
                counts[name] = counts[name] + found if name in counts else found
            number += 1
    return counts, number


@lru_cache(maxsize=1)
def _read_counts(path: Path, written_ns: int, device: torch.device) -> dict[str, Tensor]:
    """The counts in a file that was written then, on a device: every step of a stage asks for them."""
    return load_file(path, device=str(device))


def tf_idf(retrievals_N: Tensor, background_N: Tensor, num_windows: int) -> Tensor:
    """Scores (N,) float64 of the module's formula; zero where an expert was not retrieved.

    retrievals_N: in the step, background_N: windows of the background in which each was, of `num_windows`.
    """
    frequency_N = retrievals_N.double() / retrievals_N.sum().clamp_min(1)
    return frequency_N * (math.log(num_windows + 1) - (background_N.double() + 1).log())


def choose_experts(scores_N: Tensor, number: int) -> Tensor:
    """Which experts (N,) bool have the highest scores above zero, at most `number`; of equal ones those of lower id."""
    best = scores_N.argsort(descending=True, stable=True)[:number]
    chosen = torch.zeros_like(scores_N, dtype=torch.bool)
    chosen[best] = scores_N[best] > 0
    return chosen


@dataclass(frozen=True, kw_only=True)
class Sparse(Method):
    """Train rows of experts, in each step those of the highest score in each layer alone.

    What the optimizer remembers of the other rows stays as it is too (`RowAdamW(lazy=True)`).
    """

    experts: int = 1024
    """Experts of a layer that a step trains at the most."""
    windows: int = 256
    """B, windows of the background that are read."""
    frozen: tuple[str, ...] = ("keys", "query", "rest")
    """What is held besides: of "keys", sub-keys, "query", and "rest", all outside of PEER layers. Without "rest", that
    is finetuned as a whole."""

    def __post_init__(self) -> None:
        for part in self.frozen:
            if part not in FROZEN:
                raise UserError(f"sparse.frozen has {part!r}; choose of {', '.join(FROZEN)}")
        for name in ("experts", "windows"):
            if getattr(self, name) < 1:
                raise UserError(f"sparse.{name} = {getattr(self, name)}: must be at least 1")

    @property
    def needs_experts(self) -> bool:
        """It does."""
        return True

    @property
    def lazy(self) -> bool:
        """They do."""
        return True

    def prepare(self, model: PreTrainedModel, stage: Stage) -> nn.Module:
        """Freeze all but the rows, and count how the background uses them; the counts are kept in a file."""
        if stage.earlier is None:
            raise UserError(
                "method sparse compares with the use of experts by background text: name some, --background"
            )
        check_rows(model)
        if "rest" in self.frozen:
            freeze(model)
        for layer in peer_layers(model).values():
            keys = layer.product_keys
            for parameter in keys.parameters():
                parameter.requires_grad_(("keys" if parameter is keys.sub_keys else "query") not in self.frozen)
            layer.experts.requires_grad_(True)
        path = stage.folder / BACKGROUND_FILE
        if not path.is_file():
            with progress_bar(shown=stage.progress) as bar:
                task = bar.add_task("reading the background", total=self.windows)
                counts, _ = background_counts(
                    model, self._drawn(stage.earlier, after_each=lambda: bar.update(task, advance=1))
                )
            write_bytes(path, save(counts))
        return model

    def _drawn(self, background: ReplayBuffer, after_each: Callable[[], None]) -> Iterator[Tensor]:
        """Windows of the background, one by one."""
        for number in range(self.windows):
            yield background.draw(number, number + 1)[0]
            after_each()

    def train_mode(self, model: nn.Module) -> None:
        """Query norms keep their statistics."""
        train_with_fixed_statistics(model)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[Mapping[str, ExpertUsage]]:
        """Count retrievals."""
        with record_usage(model) as usage:
            yield usage

    def restrict(self, model: nn.Module, stage: Stage, usage: Mapping[str, ExpertUsage], step: int) -> None:
        """Keep the gradients of the chosen experts."""
        path = stage.folder / BACKGROUND_FILE
        background = _read_counts(path, path.stat().st_mtime_ns, device_of(model))
        chosen: dict[Table, Tensor] = {}
        for name, layer in peer_layers(model).items():
            index = f"{name}.product_keys"
            retrievals_N = usage[index].retrievals_N
            scores_N = tf_idf(retrievals_N, background[index], self.windows)
            keep_N = choose_experts(scores_N, self.experts)
            chosen[layer.experts] = chosen.get(layer.experts, False) | keep_N
        for table, keep_N in chosen.items():
            for parameter, rows in table.parts():
                restrict_gradient(parameter, keep_N[rows])
