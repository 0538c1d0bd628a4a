"""How each kind of weight is trained: parameter groups, clipping, schedules, and AdamW by rows."""

from peerlm.optim.groups import GradientNorms, clip_gradients, parameter_groups
from peerlm.optim.row_adamw import RowAdamW
from peerlm.optim.schedules import (
    cosine,
    decaying_multiplier,
    keep_learning_rates_on,
    learning_rate,
    set_learning_rates,
    wsd,
)

__all__ = [
    "GradientNorms",
    "RowAdamW",
    "clip_gradients",
    "cosine",
    "decaying_multiplier",
    "keep_learning_rates_on",
    "learning_rate",
    "parameter_groups",
    "set_learning_rates",
    "wsd",
]
