"""What the page holds: figures, and arrays of experts, contexts, tokens and edits.

Shape suffixes: E listed experts of a layer, C contexts of each, M tokens at an end of a lens, S shown tokens.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peerlm.interpret.collection import Collected, LayerRecord
from peerlm.interpret.edits import Effect
from peerlm.interpret.inspected import InspectedLayer
from peerlm.interpret.lens import Pushes
from peerlm.interpret.page import Packed
from peerlm.interpret.strings import TokenStrings
from peerlm.interpret.summary import half_use, layer_figures, relative_use, sub_key_grid, use_curve

_MOST_USED = 50
"""Experts of the most weight that are always listed."""


def listed_experts(record: LayerRecord, limit: int) -> Tensor:
    """Ids (E,), rising: the `limit` experts that wrote most, those of shown tokens, and the most used ones."""
    fired = int((record.usage.retrievals_N > 0).sum())
    wrote_most = record.importance_N.topk(min(limit, fired)).indices
    most_used = record.usage.weight_N.topk(min(_MOST_USED, fired)).indices
    shown = record.expert_SM[record.expert_SM >= 0]
    return torch.cat([wrote_most, most_used, shown]).unique()


def layer_data(
    layer: InspectedLayer, record: LayerRecord, experts_E: Tensor, pushed: Pushes, strings: TokenStrings
) -> dict[str, Any]:
    """One layer of the page."""
    grid, grid_side = sub_key_grid(layer, record)
    halves, half_side = half_use(record)
    total = record.importance_N.sum().clamp_min(1e-300)
    slot_SM = torch.searchsorted(experts_E, record.expert_SM.clamp_min(0)) + 1
    slot_SM[record.expert_SM < 0] = 0
    return {
        **layer_figures(layer, record),
        "all_listed": len(experts_E) == int((record.usage.retrievals_N > 0).sum()),
        "curve": use_curve(record),
        "grid": _rounded(grid),
        "grid_side": grid_side,
        "halves": _rounded(halves),
        "half_side": half_side,
        "experts": {
            "id": _whole(experts_E),
            "use": _rounded(relative_use(record)[experts_E]),
            "retrievals": _whole(record.usage.retrievals_N[experts_E]),
            "importance": _rounded(record.importance_N[experts_E] / total),
            "norm": _rounded(record.norm_N[experts_E]),
            "place": _whole(record.contexts.position_NC[experts_E] + 1),
            "strength": _rounded(record.contexts.strength_NC[experts_E]),
            "up": _whole(strings.vocabulary(pushed.up)),
            "up_value": _rounded(pushed.up_value),
            "down": _whole(strings.vocabulary(pushed.down)),
            "down_value": _rounded(pushed.down_value),
        },
        "tokens": {
            "slot": _whole(slot_SM),
            "weight": _rounded(record.weight_SM),
            "activation": _rounded(record.activation_SM),
            "fired": _whole(record.fired_S),
            "share": _rounded(record.share_S),
        },
    }


def text_data(tokens: Tensor, collected: Collected, strings: TokenStrings) -> dict[str, Any]:
    """The text of the page, and what the model predicted in its shown part."""
    shown = len(collected.predicted)
    return {
        "text": _whole(torch.tensor(strings.text(tokens.tolist()))),
        "shown": shown,
        "nats": _rounded(collected.nats[:shown]),
        "predicted": _whole(strings.vocabulary(collected.predicted)),
        "probability": _rounded(collected.probability),
    }


def edit_data(effects: Sequence[Effect], scored: int, strings: TokenStrings) -> dict[str, Any]:
    """Knock-outs and boosts of the page; the change of the loss is the mean over `scored` tokens."""
    changes = torch.stack([effect.change for effect in effects]) if effects else torch.zeros(0, 0)
    return {
        "list": [
            {
                "layer": effect.edit.layer,
                "expert": effect.edit.expert,
                "factor": effect.edit.factor,
                "loss": _short(effect.change.sum().item() / scored),
                "places": [
                    {
                        "position": position,
                        "nats": _short(divergence),
                        "tokens": strings.vocabulary(torch.tensor([token for token, _ in tokens])).tolist(),
                        "probabilities": [_short(probability) for _, probability in tokens],
                    }
                    for position, divergence, tokens in zip(
                        effect.positions, effect.divergence, effect.tokens, strict=True
                    )
                ],
            }
            for effect in effects
        ],
        "change": _rounded(changes),
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _rounded(values: Tensor) -> Packed:
    """Numbers in bfloat16: about 3 digits, in two bytes."""
    return Packed("bfloat16", values.to(torch.bfloat16).contiguous().view(torch.int16).numpy())


def _whole(values: Tensor) -> Packed:
    """Integers from 0 in the narrowest unsigned type."""
    numbers = values.numpy()
    narrow = numbers.astype(np.min_scalar_type(int(numbers.max())) if numbers.size else np.uint8)
    return Packed(str(narrow.dtype), narrow)
