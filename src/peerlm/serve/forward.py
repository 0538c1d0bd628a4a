"""Forward passes of a causal model for rows of different lengths, and which models have such."""

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from peerlm.errors import UserError
from peerlm.serve.cache import SlotCache, bytes_per_token

CHECK = ((3, 1, 4, 1, 5), (2, 6, 5))
"""Token ids of two sequences that a model is tried with."""
MOST_ERROR = 0.02
"""Of logits in a batch, relative to those of a sequence alone; models that ignore masks or positions are far beyond."""


class Forward:
    """A model's next-token logits for rows that are padded on the left, or lie in a `SlotCache`.

    Args:
        model: of transformers, for causal language modeling, in evaluation mode.

    Attributes:
        vocab_size: of the logits.
        bytes_per_token: of the cache, for one row.

    Raises:
        UserError: the model's cache or its layers do not allow rows to join and leave.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self._options = set(inspect.signature(model.forward).parameters)
        for name, module in model.named_modules():
            if getattr(module, "chooses_among_tokens", False):
                raise UserError(
                    f"{name} chooses among the tokens of a whole batch, so that requests would change each other's "
                    "text; serve a model without layers of expert choice"
                )
        if model.training:
            raise ValueError("the model is in training mode; call model.eval() first")
        with torch.no_grad():
            self._check()

    @property
    def device(self) -> torch.device:
        """Where token ids are put."""
        return self.model.device

    def prefill(
        self, prompts: Sequence[Sequence[int]], cache: Cache | None, *, all_logits: bool
    ) -> tuple[Tensor, Cache, Tensor]:
        """Read prompts, or the next tokens of one whose beginning is in a cache.

        Args:
            prompts: token ids of each row; of one row alone where the cache holds something.
            cache: of one row; None for a new one.
            all_logits: whether logits of every token are wanted, not of the last one alone.

        Returns:
            Logits (rows, tokens or 1, vocabulary), the cache, and the mask of real tokens (rows, tokens).
        """
        cache = DynamicCache(config=self.model.config) if cache is None else cache
        past, most = cache.get_seq_length(), max(map(len, prompts))
        ids = torch.tensor([[0] * (most - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (most - len(prompt)) + [1] * (past + len(prompt)) for prompt in prompts])
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)[:, past:]
        logits = self._run(ids, mask, positions, cache, all_logits)
        return logits, cache, mask[:, past:].bool()

    def decode(self, tokens: Sequence[int], cache: SlotCache) -> Tensor:
        """Logits (rows, vocabulary) after one token more for each of `cache.part`; the cache is not advanced."""
        lengths = cache.lengths[cache.part]
        alone = len(cache.lengths) == 1  # all columns are its own: nothing is masked
        logits = self._run(
            torch.tensor([[token] for token in tokens]),
            None if alone else cache.mask(torch.device("cpu")),
            torch.tensor([[length] for length in lengths]),
            cache,
            False,
        )
        return logits[:, -1]

    def _run(self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Cache, all_logits: bool) -> Tensor:
        device = self.device
        options: dict[str, Any] = {}
        if "position_ids" in self._options:
            options["position_ids"] = positions.to(device)
        if "logits_to_keep" in self._options and not all_logits:
            options["logits_to_keep"] = 1
        output = self.model(
            input_ids=ids.to(device),
            attention_mask=None if mask is None else mask.to(device),
            past_key_values=cache,
            use_cache=True,
            **options,
        )
        logits = cast(Tensor, output.logits)
        return logits if all_logits else logits[:, -1:]

    def _check(self) -> None:
        """Compare a step of a batch with each sequence alone, and look at the cache."""
        name = type(self.model).__name__
        embeddings: Any = self.model.get_input_embeddings()
        limit = int(embeddings.weight.shape[0])
        first, second = ([token % limit for token in tokens] for tokens in CHECK)
        alone = []
        for tokens in (first, second):
            logits, cache, _ = self.prefill([tokens], None, all_logits=False)
            kinds = {type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer}
            if type(cache) is not DynamicCache or kinds or not cache.layers or not cache.get_seq_length():
                raise UserError(
                    f"{name} keeps {', '.join(sorted(kinds)) or type(cache).__name__} in its cache; the engine serves "
                    "models whose attention sees all tokens, without sliding windows or recurrent states"
                )
            alone.append(logits[0, -1])
        self.vocab_size = alone[0].shape[-1]
        slots = SlotCache(2, 8)
        _, together, _ = self.prefill([first[:-1], second[:-1]], None, all_logits=False)
        self.bytes_per_token = bytes_per_token(together)
        for row, tokens in enumerate((first, second)):
            slots.join(together, row, len(tokens) - 1)
        slots.part = slice(0, 2)
        slots.prepare()
        found = self.decode([first[-1], second[-1]], slots)
        expected = torch.stack(alone).double()
        error = (found.double() - expected).norm() / expected.norm()
        if not error <= (MOST_ERROR if found.dtype == torch.float32 else 10 * MOST_ERROR):
            raise UserError(
                f"logits of {name} differ by {error:.1%} between a batch and a sequence alone, so that requests would "
                "change each other's text; it cannot be served"
            )
