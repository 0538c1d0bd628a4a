"""Forward passes over the windows of a text, each token read once."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from peerlm.evaluate.likelihood import Report, check_context, device_of, last_logits, silent, token_nats
from peerlm.evaluate.run import TOKENS_PER_PASS
from peerlm.layers.modes import evaluating


def windows_of(length: int, context: int) -> list[tuple[int, int]]:
    """(start, end) of consecutive windows of `context` tokens; the last may be shorter."""
    return [(start, min(start + context, length)) for start in range(0, length, context)]


def read_windows(
    model: nn.Module, tokens: Tensor, *, context: int, report: Report = silent
) -> Iterator[tuple[Tensor, Tensor]]:
    """Read consecutive windows, some at a time, in evaluation mode.

    Args:
        model: causal language model.
        tokens: (length,) int64.
        context: tokens of a window; the last window may be shorter.
        report: called after each pass with how many tokens were read, and how many there are.

    Yields:
        positions (batch, width) int64 on the CPU, and logits (batch, width, vocabulary) of the tokens after them.

    Raises:
        UserError: an impossible context.
    """
    check_context(model, context)
    device = device_of(model)
    full = len(tokens) // context * context
    positions = torch.arange(len(tokens))
    per_pass = max(1, TOKENS_PER_PASS[device.type] // context)
    batches = list(positions[:full].view(-1, context).split(per_pass)) if full else []
    if full < len(tokens):
        batches.append(positions[full:][None])
    for positions_BT in batches:
        with evaluating(model):
            logits = last_logits(model, tokens[positions_BT].to(device), positions_BT.shape[1])
        yield positions_BT, logits
        report(int(positions_BT[-1, -1]) + 1, len(tokens))


def window_nats(logits: Tensor, tokens_BT: Tensor) -> Tensor:
    """Negative log-likelihood in nats of the tokens of windows (batch, width), float64, CPU; NaN for the first."""
    nats = torch.full(tokens_BT.shape, torch.nan, dtype=torch.float64)
    if tokens_BT.shape[1] > 1:
        nats[:, 1:] = token_nats(logits[:, :-1], tokens_BT[:, 1:].to(logits.device)).double().cpu()
    return nats
