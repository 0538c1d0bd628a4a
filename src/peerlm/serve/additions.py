"""Packs, adapters and libraries beside a model, and which of them each row of a batch has."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peerlm.adapters.library import AdapterLibrary
from peerlm.adapters.library.base import BaseModel
from peerlm.adapters.library.cache import num_bytes
from peerlm.adapters.library.lora_files import CONFIG_NAME, LoraWeights, LowRank, read_lora
from peerlm.adapters.library.manifest import MANIFEST
from peerlm.adapters.library.mix import Mix
from peerlm.errors import UserError
from peerlm.packs.api import choose_packs, loaded_packs, read_pack, unload_pack
from peerlm.packs.files import check_pack_name

MOST_BYTES = 2**30
"""Of the adapters that libraries gave; those that requests use now stay in any case."""


@dataclass(frozen=True)
class Choice:
    """What one sequence uses, fixed before its prompt is read."""

    packs: tuple[str, ...] = ()
    adapters: tuple[tuple[str, float], ...] = ()
    """Names and weights; those of a library have its name and a slash before their own."""


class Additions:
    """What is loaded beside a model. Methods are for one thread, but for `read`.

    Packs are `peerlm.packs`' own. Adapters add low-rank terms to the outputs of linear layers by hooks, to the rows
    alone that have chosen them; no weight changes.

    Args:
        model: of transformers.
        in_use: gives what the requests use that have not ended.
    """

    def __init__(self, model: PreTrainedModel, in_use: Callable[[], Iterable[Choice]]):
        self._model = model
        self._in_use = in_use
        self.kinds: dict[str, str] = dict.fromkeys(loaded_packs(model), "pack")
        self._adapters: dict[str, LoraWeights] = {}
        self._libraries: dict[str, AdapterLibrary] = {}
        self._base: BaseModel | None = None
        self._hooks: list[Any] = []
        self._chosen: _Rows | None = None
        self._last: tuple[tuple[Choice, ...], _Rows] | None = None

    def read(self, name: str, folder: Path) -> tuple[str, Callable[[], None]]:
        """The kind of what lies in a folder, and what puts it beside the model between two forward passes.

        Any thread; what takes long is done here.

        Raises:
            ValueError: the name is unusual, or the folder has nothing that this model can use.
        """
        check_pack_name(name)
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder; name one that has a pack, an adapter or a library")
        if (folder / MANIFEST).is_file():
            library = AdapterLibrary(self._model, folder)
            return "library", lambda: self._put_library(name, library)
        if (folder / CONFIG_NAME).is_file():
            weights = read_lora(folder)
            BaseModel(self._model).check_adapts(weights, folder)
            _check_finite(weights, folder)
            return "adapter", lambda: self._put_adapter(name, self._placed(weights))
        load = read_pack(self._model, folder, name)
        return "pack", lambda: self._put_pack(name, load)

    def take(self, name: str) -> None:
        """Unload; afterwards the model has the bits that it had before."""
        kind = self.kinds.pop(name)
        self._last = None
        if kind == "pack":
            unload_pack(self._model, name)
            return
        self._adapters.pop(name, None)
        self._libraries.pop(name, None)
        for key in [key for key in self._adapters if key.startswith(f"{name}/")]:
            del self._adapters[key]
        if not set(self.kinds.values()) & {"adapter", "library"}:
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()
            self._base = None

    @torch.no_grad()
    def choice(self, names: Sequence[str], prompt: Sequence[int]) -> Choice:
        """What these names mean for a prompt: a library retrieves its adapters by it."""
        self._drop_unused()
        packs, adapters = [], []
        for name in names:
            kind = self.kinds[name]
            if kind == "pack":
                packs.append(name)
            elif kind == "adapter":
                adapters.append((name, 1.0))
            else:
                adapters += self._retrieved(name, prompt)
        return Choice(tuple(sorted(packs)), tuple(sorted(adapters)))

    @contextmanager
    def chosen(self, choices: Sequence[Choice]) -> Iterator[None]:
        """Within this context the rows of a batch have what was chosen for each."""
        with ExitStack() as stack:
            stack.enter_context(self._packs_of([choice.packs for choice in choices]))
            if self._hooks:
                self._chosen = self._rows(tuple(choices))
            try:
                yield
            finally:
                self._chosen = None

    def _rows(self, choices: tuple[Choice, ...]) -> "_Rows | None":
        """Kept from one step to the next, where rows are the same."""
        if not any(choice.adapters for choice in choices):
            return None
        if self._last is None or self._last[0] != choices:
            self._last = (choices, _Rows(choices, self._adapters, self._model.device))
        return self._last[1]

    def _put_pack(self, name: str, load: Callable[[], str]) -> None:
        load()
        self.kinds[name] = "pack"

    def _put_adapter(self, name: str, weights: LoraWeights) -> None:
        self._adapters[name] = weights
        self.kinds[name] = "adapter"
        self._hook()

    def _put_library(self, name: str, library: AdapterLibrary) -> None:
        self._libraries[name] = library
        self.kinds[name] = "library"
        self._hook()

    def _hook(self) -> None:
        if self._base is None:
            self._base = BaseModel(self._model)
            self._hooks = [
                module.register_forward_hook(self._adding(path)) for path, module in self._base.linear.items()
            ]

    def _adding(self, path: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        def add(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor | None:
            return None if self._chosen is None else self._chosen.added(path, arguments[0], output)

        return add

    def _retrieved(self, name: str, prompt: Sequence[int]) -> list[tuple[str, float]]:
        library = self._libraries[name]
        with self._packs_of([()]):
            weights, names = library.retrieve(torch.tensor([list(prompt)], device=self._model.device))
        found = []
        for adapter, weight in zip(names[0], weights[0].tolist(), strict=True):
            key = f"{name}/{adapter}"
            if key in self._adapters:
                self._adapters[key] = self._adapters.pop(key)  # as the last one used
            else:
                read = library.cache(adapter)
                _check_finite(read, library.folder / adapter)
                self._adapters[key] = self._placed(read)
            found.append((key, weight))
        return found

    def _packs_of(self, packs: Sequence[Sequence[str]]) -> AbstractContextManager[None]:
        """Within this context each row has these packs, in place of all that are loaded."""
        return choose_packs(self._model, packs) if "pack" in self.kinds.values() else nullcontext()

    def _drop_unused(self) -> None:
        """Drop what libraries gave and no request names, the least recently used first, while it takes too much."""
        retrieved = {key: num_bytes(weights) for key, weights in self._adapters.items() if "/" in key}
        too_much = sum(retrieved.values()) - MOST_BYTES
        if too_much <= 0:
            return
        named = {key for choice in self._in_use() for key, _ in choice.adapters}
        for key in [key for key in retrieved if key not in named]:
            if too_much > 0:
                del self._adapters[key]
                too_much -= retrieved[key]

    def _placed(self, weights: LoraWeights) -> LoraWeights:
        device = self._model.device
        return {path: LowRank(down=term.down.to(device), up=term.up.to(device)) for path, term in weights.items()}


def _check_finite(weights: LoraWeights, folder: Path) -> None:
    """Raise a UserError where an adapter would spoil the rows of others: 0 times NaN is NaN."""
    for path, term in weights.items():
        if not (term.down.isfinite().all() and term.up.isfinite().all()):
            raise UserError(f"{folder} has numbers for {path} that are not finite; train it again")


class _Rows:
    """The adapters of a batch: which rows have any, and the weight of each for each of these."""

    def __init__(self, choices: Sequence[Choice], adapters: dict[str, LoraWeights], device: torch.device):
        names = sorted({name for choice in choices for name, _ in choice.adapters})
        rows = [row for row, choice in enumerate(choices) if choice.adapters]
        weights_RU = torch.zeros(len(rows), len(names))
        for place, row in enumerate(rows):
            for name, weight in choices[row].adapters:
                weights_RU[place, names.index(name)] += weight
        self._batch = len(choices)
        self._rows = None if len(rows) == len(choices) else torch.tensor(rows, device=device)
        self._mix = Mix([adapters[name] for name in names], weights_RU[:, None].to(device))

    def added(self, path: str, x: Tensor, output: Tensor) -> Tensor | None:
        """The output of a linear layer with the terms of adapters; None where no adapter has any there."""
        if x.ndim != 3 or len(x) != self._batch:
            if path not in {path for adapter in self._mix.adapters for path in adapter}:
                return None
            raise ValueError(
                f"{path} reads {tuple(x.shape)}; adapters can only be added where a layer reads "
                "(batch, tokens, features)"
            )
        if self._rows is not None:
            x = x[self._rows]
        weights = self._mix.weights
        self._mix.weights = weights[:, :1].expand(-1, x.shape[1], -1)
        try:
            found = self._mix.output(path, x)
        finally:
            self._mix.weights = weights
        if found is None:
            return None
        found = found.to(output.dtype)
        return output + found if self._rows is None else output.index_add(0, self._rows, found)
