"""Knock out or boost an expert, and measure what changes.

Shape suffixes: B variants of a window, W tokens of a window, H heads, K retrieved per head, S shown tokens.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peerlm.errors import UserError
from peerlm.evaluate.likelihood import Report, check_context, device_of, last_logits, silent
from peerlm.evaluate.run import TOKENS_PER_PASS
from peerlm.interpret.gates import OpenedTokens, watching_gates
from peerlm.interpret.inspected import InspectedLayer, find_inspected_layer, find_inspected_layers
from peerlm.interpret.windows import window_nats, windows_of
from peerlm.layers.modes import evaluating


@dataclass(frozen=True)
class Edit:
    """One expert's output multiplied by a factor: 0 knocks it out, 2 doubles it, 1 changes nothing."""

    layer: int | str
    """A layer's number or name, as `find_inspected_layers` gives them."""
    expert: int
    factor: float

    @classmethod
    def read(cls, text: str, factor: float | None = None) -> "Edit":
        """LAYER:EXPERT for this factor, or LAYER:EXPERT=FACTOR; raises UserError where it is something else."""
        match = re.fullmatch(r"([\w.]+):(\d+)(?:=(-?\d+(?:\.\d*)?))?", text)
        if match is None or (match[3] is None) == (factor is None):
            form = "LAYER:EXPERT=FACTOR, as in 1:123=2" if factor is None else "LAYER:EXPERT, as in 1:123"
            raise UserError(f"{text!r} names no expert; write {form}")
        layer = int(match[1]) if match[1].isdigit() else match[1]
        return cls(layer, int(match[2]), float(match[3]) if factor is None else factor)


@contextmanager
def edit(model: nn.Module, layer: int | str, expert: int, factor: float) -> Iterator[None]:
    """Within this context one expert's output is multiplied by `factor`; weights of others stay as they are.

    No table is changed, so that int8 and mapped rows will do, and leaving the context leaves nothing. Contexts nest.

    Args:
        model: any model with PEER layers or product-key memories.
        layer: the layer's number (the first in its module's path, its block's) or its module's path.
        expert: its id.
        factor: 0 knocks the expert out, 2 doubles it.

    Raises:
        UserError: no such layer or expert.
    """
    inspected = find_inspected_layer(find_inspected_layers(model), layer, expert)
    with _scaled(inspected, torch.tensor([expert]), torch.tensor([factor])):
        yield


@contextmanager
def _scaled(layer: InspectedLayer, expert_B: Tensor, factor_B: Tensor) -> Iterator[None]:
    """Multiply the weights of expert b by factor b in sequence b of each batch; with a single b in all sequences."""
    with watching_gates([layer]) as opened:
        handle = layer.index.register_forward_hook(partial(_scale_weights, layer, opened, expert_B, factor_B))
        try:
            yield
        finally:
            handle.remove()


def _scale_weights(
    layer: InspectedLayer,
    opened: OpenedTokens,
    expert_B: Tensor,
    factor_B: Tensor,
    module: nn.Module,
    args: Any,
    output: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    weights, ids = output
    by_token = ids.flatten(0, -3)
    tokens = opened.of(layer, len(by_token))
    # Tokens of a sequence follow each other, flattened or not, and sequences are equally long.
    sequence_T = tokens.tokens * len(expert_B) // tokens.total
    hit = by_token == expert_B[sequence_T].to(ids.device)[:, None, None]
    factor = factor_B[sequence_T].to(weights)[:, None, None]
    scaled = weights.view_as(by_token)
    return torch.where(hit, scaled * factor, scaled).view_as(weights), ids


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What an edit changes in a text."""

    edit: Edit
    change: Tensor
    """(S,) float64: change of each token's nats; 0 where nothing was scored or the expert did not fire before."""
    positions: list[int]
    """Where next-token distributions change most, by KL divergence from the old one; at most `PLACES`."""
    divergence: list[float]
    """In nats, of each position."""
    tokens: list[list[tuple[int, float]]]
    """The likeliest next tokens after the edit and their probabilities, of each position."""


PLACES = 4
_TOP = 5


def edit_effects(
    model: nn.Module,
    tokens: Tensor,
    edits: Sequence[Edit],
    *,
    context: int,
    report: Report = silent,
) -> list[Effect]:
    """The effect of each edit by itself on a text, many edits in one forward pass.

    Args:
        model: causal language model.
        tokens: (S,) int64, read in consecutive windows.
        edits: each is measured alone.
        context: tokens of a window.
        report: called with how many variants of windows were read, and how many there are.

    Windows in which an edit's expert does not fire are not read again.

    Raises:
        UserError: no such layer or expert, or an impossible context.
    """
    check_context(model, context)
    layers = find_inspected_layers(model)
    of_edit = [find_inspected_layer(layers, item.layer, item.expert) for item in edits]
    device = device_of(model)
    change = torch.zeros(len(edits), len(tokens), dtype=torch.float64)
    divergence = torch.zeros(len(edits), len(tokens))
    best: list[dict[int, list[tuple[int, float]]]] = [{} for _ in edits]
    windows = windows_of(len(tokens), context)
    for number, (start, end) in enumerate(windows):
        window = tokens[start:end]
        with evaluating(model):
            fired, logits = _fired_experts(model, layers, window.to(device)[None])
        before = logits[0].log_softmax(dim=-1)
        nats = window_nats(logits, window[None])[0]
        pending = [e for e, item in enumerate(edits) if item.expert in fired[of_edit[e].number]]
        batch_size = max(1, TOKENS_PER_PASS[device.type] // (end - start))
        for first in range(0, len(pending), batch_size):
            batch = pending[first : first + batch_size]
            with evaluating(model):
                after = _edited_logits(model, window.to(device), [edits[e] for e in batch], [of_edit[e] for e in batch])
            changed = window_nats(after, window.expand(len(batch), -1)) - nats
            change[batch, start:end] = changed.nan_to_num(0.0)
            after = after.log_softmax(dim=-1)
            kl = (before.exp() * (before - after)).sum(dim=-1).clamp_min(0).float().cpu()
            divergence[batch, start:end] = kl
            for row, e in enumerate(batch):
                for place in kl[row].topk(min(PLACES, len(window))).indices.tolist():
                    best[e][start + place] = likeliest(after[row, place])
            report(number * len(edits) + first + len(batch), len(windows) * len(edits))
    report(len(windows) * len(edits), len(windows) * len(edits))
    return [_effect(item, change[e], divergence[e], best[e]) for e, item in enumerate(edits)]


def _effect(item: Edit, change: Tensor, divergence: Tensor, best: dict[int, list[tuple[int, float]]]) -> Effect:
    positions = sorted(best, key=lambda position: -float(divergence[position]))[:PLACES]
    return Effect(
        edit=item,
        change=change,
        positions=positions,
        divergence=divergence[positions].tolist(),
        tokens=[best[position] for position in positions],
    )


def likeliest(log_probabilities_V: Tensor) -> list[tuple[int, float]]:
    """The likeliest tokens and their probabilities, at most 5."""
    best = log_probabilities_V.topk(min(_TOP, len(log_probabilities_V)))
    return list(zip(best.indices.tolist(), best.values.exp().tolist(), strict=True))


def _fired_experts(
    model: nn.Module, layers: Sequence[InspectedLayer], input_ids: Tensor
) -> tuple[dict[int, set[int]], Tensor]:
    """The experts that each layer retrieves in a window, by the layer's number, and the logits."""
    fired: dict[int, set[int]] = {layer.number: set() for layer in layers}  # none where a pack says nothing

    def keep(number: int, module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
        fired[number] = set(output[1].unique().tolist())

    handles = [layer.index.register_forward_hook(partial(keep, layer.number)) for layer in layers]
    try:
        logits = last_logits(model, input_ids, input_ids.shape[1])
    finally:
        for handle in handles:
            handle.remove()
    return fired, logits


def _edited_logits(
    model: nn.Module, window_W: Tensor, edits: Sequence[Edit], layers: Sequence[InspectedLayer]
) -> Tensor:
    """Logits (B, W, vocabulary) of one window under each edit."""
    factor_B = torch.tensor([item.factor for item in edits])
    with ExitStack() as stack:
        for layer in {layer.number: layer for layer in layers}.values():
            expert_B = torch.tensor([e.expert if own is layer else -1 for e, own in zip(edits, layers, strict=True)])
            stack.enter_context(_scaled(layer, expert_B, factor_B))
        return last_logits(model, window_W.expand(len(edits), -1), len(window_W))
