"""The log-likelihood of tokens under a causal language model: the forward pass of every evaluation."""

import inspect
import math
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peerlm.errors import UserError

Report = Callable[[int, int], object]
"""Called with how much is done, and how much there is."""


def silent(done: int, total: int) -> None:
    """Report nothing."""


def check_context(model: nn.Module, context: int) -> None:
    """UserError unless 2 <= context <= the model's max_position_embeddings, where it has such a bound."""
    if context < 2:
        raise UserError(f"the context is {context}; a window needs at least 2 tokens")
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and context > longest:
        raise UserError(f"the context is {context}, but this model reads at most {longest} tokens; take that or less")


def device_of(model: nn.Module) -> torch.device:
    """The device that holds the model's first parameter, where its inputs belong."""
    return next(model.parameters()).device


def last_logits(model: nn.Module, input_ids: Tensor, keep: int, attention_mask: Tensor | None = None) -> Tensor:
    """Logits (batch, keep, vocabulary), at least float32, of the last `keep` of input_ids (batch, length).

    A model whose forward takes `logits_to_keep` computes no others; one that takes `use_cache` keeps no
    cache.
    """
    options = {"logits_to_keep": keep, "use_cache": False, "attention_mask": attention_mask}
    known = inspect.signature(model.forward).parameters
    arguments = {name: value for name, value in options.items() if name in known and value is not None}
    logits: Tensor = model(input_ids=input_ids, **arguments).logits[:, -keep:]
    return logits if logits.dtype == torch.float64 else logits.float()


def token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats of targets (batch, length) under logits (batch, length, vocabulary)."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def score_endings(model: nn.Module, batch: Sequence[tuple[Sequence[int], int]]) -> tuple[Tensor, Tensor]:
    """Score the ends of sequences of any lengths in one forward pass, padded on the right.

    Args:
        model: causal language model.
        batch: token ids, and how many of the last of them are scored: at least 1, less than there are.

    Returns:
        Of each sequence, on the CPU: the nats of its end (batch,) float64, and whether all of the end's tokens are the
        likeliest (batch,) bool.
    """
    lengths = [len(tokens) - 1 for tokens, _ in batch]
    longest = max(lengths)
    device = device_of(model)
    padded = torch.tensor([[*tokens, *[0] * (longest + 1 - len(tokens))] for tokens, _ in batch])
    position, ends = torch.arange(longest), torch.tensor(lengths)[:, None]
    starts = ends - torch.tensor([[scored] for _, scored in batch])
    keep = longest - int(starts.min())
    in_end = ((starts <= position) & (position < ends))[:, -keep:]
    attention_mask = (position < ends).to(device) if min(lengths) < longest else None
    logits = last_logits(model, padded[:, :-1].to(device), keep, attention_mask)
    targets = padded[:, 1:][:, -keep:].to(device)
    nats = token_nats(logits, targets).double().cpu().masked_fill(~in_end, 0.0).sum(1)
    missed = ((logits.argmax(-1) != targets).cpu() & in_end).any(1)
    return nats, ~missed


def exp(nats: float) -> float:
    """Exponential, infinite where that is more than a float holds."""
    return math.exp(nats) if nats < math.log(sys.float_info.max) else math.inf
