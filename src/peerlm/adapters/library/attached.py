"""Hooks that choose adapters for each forward pass of a model, and add their terms to its linear layers."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from peerlm.adapters.library.base import BaseModel, hidden_states
from peerlm.adapters.library.lora_files import LoraWeights
from peerlm.adapters.library.mix import Mix

ROUTES = ("sequence", "token")


class Attached:
    """A library's hooks on its model, from `attach()` to `detach()`.

    Args:
        base: the model.
        layer: the block whose output queries are, counted from 1.
        route: "sequence" or "token", as `AdapterLibrary` explains them.
        choose: from queries (..., D) to weights and positions of adapters, (..., K).
        by_position: an adapter's weights by its position.
        by_name: an adapter's weights by its name.

    Attributes:
        mix: the adapters of the forward pass; None where there are none.
    """

    def __init__(
        self,
        base: BaseModel,
        *,
        layer: int,
        route: str,
        choose: Callable[[Tensor], tuple[Tensor, Tensor]],
        by_position: Callable[[int], LoraWeights],
        by_name: Callable[[str], LoraWeights],
    ):
        self.base = base
        self.layer = layer
        self.route = route
        self.mix: Mix | None = None
        self._fixed: Mapping[str, float] | None = None
        self._choose = choose
        self._by_position = by_position
        self._by_name = by_name
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._sums: tuple[Tensor, Tensor] | None = None
        self._prompts: WeakKeyDictionary[Any, Mix | tuple[Tensor, Tensor]] = WeakKeyDictionary()
        self._mask: Tensor | None = None

    def attach(self) -> None:
        """Register the hooks; nothing happens a second time."""
        if self._hooks:
            return
        model = self.base.model
        self._hooks.append(model.register_forward_pre_hook(self._before_forward, with_kwargs=True))
        self._hooks.append(model.register_forward_hook(self._after_forward, with_kwargs=True))
        if self.route == "token":
            self._hooks.append(self.base.blocks[self.layer - 1].register_forward_hook(self._after_query_block))
        for name, module in self.base.linear.items():
            self._hooks.append(module.register_forward_hook(self._adding(name)))

    def detach(self) -> None:
        """Remove the hooks, and forget what was chosen."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.forget()

    @contextmanager
    def using(self, weights: Mapping[str, float]) -> Iterator[None]:
        """Attached, but with these adapters, by name, at these weights for every sequence."""
        before, attached = self._fixed, bool(self._hooks)
        self._fixed, self.mix = weights, None
        self.attach()
        try:
            yield
        finally:
            self._fixed, self.mix = before, None
            if not attached:
                self.detach()

    def forget(self) -> None:
        """Forget what was chosen, for cached prompts too."""
        self.mix = self._sums = None
        self._prompts.clear()

    def _before_forward(self, model: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Choose the adapters of a batch; those of a cached prompt stay."""
        if self.base.reading:
            return
        given = self.base.arguments(arguments, options)
        input_ids, mask, past = (given.get(name) for name in ("input_ids", "attention_mask", "past_key_values"))
        if input_ids is None:
            raise ValueError("the library retrieves by input_ids; pass these, not inputs_embeds")
        if mask is not None and mask.ndim != 2:
            raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; the library needs (batch, tokens)")
        if self._fixed is not None:
            if self.mix is None or len(self.mix.weights) != len(input_ids):
                weights = torch.tensor([list(self._fixed.values())] * len(input_ids), device=input_ids.device)
                index = torch.arange(len(self._fixed), device=input_ids.device).expand(len(input_ids), -1)
                self.mix = Mix([self._by_name(name) for name in self._fixed], weights, index)
            return
        self.mix = self._sums = None
        self._mask = None if mask is None else mask[:, -input_ids.shape[1] :]
        if past is not None and past.get_seq_length() > 0:
            self._continue(self._prompts.get(past), len(input_ids))
        elif self.route == "sequence":
            self.mix = self._mix_of(*self._choose(self.base.queries(self.layer, input_ids, mask)))

    def _continue(self, prompt: Mix | tuple[Tensor, Tensor] | None, batch: int) -> None:
        """Take up what is known of a cached prompt."""
        if prompt is None or len(prompt.weights if isinstance(prompt, Mix) else prompt[0]) != batch:
            raise ValueError(
                f"past_key_values hold a prompt of {batch} sequences whose adapters are not known; read it while the "
                "library is attached, and pass on the cache that this gave, not a copy of it"
            )
        if isinstance(prompt, Mix):
            self.mix = prompt
        else:
            self._sums = prompt

    def _after_forward(
        self, model: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], output: Any
    ) -> None:
        """Remember what was chosen, with the cache that holds the prompt."""
        if self.base.reading or self._fixed is not None:
            return
        past = getattr(output, "past_key_values", None)
        past = past or self.base.arguments(arguments, options).get("past_key_values")
        chosen = self.mix if self.route == "sequence" else self._sums
        if past is not None and chosen is not None:
            self._prompts[past] = chosen

    def _mix_of(self, weights: Tensor, index: Tensor) -> Mix:
        used, position = index.unique(return_inverse=True)
        return Mix([self._by_position(place) for place in used.tolist()], weights, position)

    def _after_query_block(self, module: nn.Module, arguments: Any, output: Any) -> None:
        """Route "token": choose by the mean hidden state up to each token."""
        if self.base.reading or self._fixed is not None:
            return
        hidden_BTD = hidden_states(output).detach().float()
        mask_BT = hidden_BTD.new_ones(hidden_BTD.shape[:2]) if self._mask is None else self._mask.to(hidden_BTD)
        sums_BTD = (hidden_BTD * mask_BT[..., None]).cumsum(dim=1)
        counts_BT = mask_BT.cumsum(dim=1)
        if self._sums is not None:
            sums_BTD, counts_BT = sums_BTD + self._sums[0][:, None], counts_BT + self._sums[1][:, None]
        self._sums = sums_BTD[:, -1], counts_BT[:, -1]
        weights, index = self._choose(sums_BTD / counts_BT.clamp_min(1)[..., None])
        mix = self._mix_of(weights, index)
        assert mix.index is not None
        shape = (*index.shape[:2], len(mix.adapters))
        mix.weights = torch.zeros(shape, device=weights.device).scatter_add(-1, mix.index, weights)
        mix.index = None
        self.mix = mix

    def _adding(self, name: str) -> Any:
        def add(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor | None:
            added = None if self.base.reading or self.mix is None else self.mix.output(name, arguments[0])
            return None if added is None else output + added.to(output.dtype)

        return add
