"""What a block's attention does to one new token of each of a few sequences, as one call of a backend.

Shape suffixes: R sequences, D width, H query heads, G key and value heads, C features of a head, L columns of a cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from torch import Tensor

Step = Callable[[Tensor, Tensor | None, Tensor, Tensor, Tensor | None, Tensor], Tensor | None]
"""Of hidden states (R, 1, D), to which `added` (R, 1, D), where there is one, and what attention makes are added in
place; of keys and values (R, G, L, C), whose last column is written (with a shift keys are (R, G, L, C + 1)); of a mask
(R, L) int64, 0 where a column is hidden, or None; and of positions (R or 1, 1) int64. It gives the norm after
attention, (R, 1, D). Where it cannot do this, or the mask hides a new token, it does nothing and gives None."""

AddedNorm = Callable[[Tensor, Tensor | None], Tensor]
"""Of hidden states (R, 1, D), to which `added`, where there is one, is added in place: their norm."""


Layer = Callable[[Tensor], Tensor | None]
"""What `api.whole_layer` gives."""

Columns = tuple[Tensor, Tensor]
"""A block's keys and values, as a step takes them."""

Through = Callable[[Tensor, Sequence[Columns], Tensor | None, Tensor], Tensor | None]
"""Of hidden states (R, 1, D), which are changed, the columns of each block, a mask and positions, as a step takes them:
the last norm (R, 1, D); or None, as of a step."""


@dataclass(frozen=True, kw_only=True)
class RMSNorm:
    """weight * x / sqrt(mean of squares + epsilon)."""

    weight: Tensor
    epsilon: float


@dataclass(frozen=True, kw_only=True)
class Shift:
    """Weights (G,) with which a key and a value, and those of the slot before, are mixed.

    The number that a key has more is 1 where the token before is in the slot before, else 0.
    """

    key: Tensor
    previous_key: Tensor
    value: Tensor
    previous_value: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All of them, in this order."""
        return self.key, self.previous_key, self.value, self.previous_value


@dataclass(frozen=True, kw_only=True)
class AttentionStep:
    """The numbers of a block's attention with rotary positions, without biases."""

    before: RMSNorm
    """(D), of what attention reads."""
    after: RMSNorm
    """(D), of what follows."""
    query_map: Tensor
    """(H * C, D)."""
    key_map: Tensor
    """(G * C, D)."""
    value_map: Tensor
    """(G * C, D)."""
    output_map: Tensor
    """(D, H * C)."""
    query_norm: RMSNorm | None
    """(C), of each head before the rotation."""
    key_norm: RMSNorm | None
    """(C), likewise; of the same epsilon."""
    frequencies: Tensor
    """(C / 2), radians per position."""
    rotation_scale: float
    """What cosines and sines are multiplied by."""
    scaling: float
    """What scores are multiplied by."""
    shift: Shift | None = None
    """Of keys, each rotated on by one position for the slot behind it, and of values."""

    def tensors(self) -> list[Tensor]:
        """All tensors, which all are in float32."""
        values = [getattr(self, field.name) for field in fields(self)]
        norms = [each.weight for each in values if isinstance(each, RMSNorm)]
        shift = () if self.shift is None else self.shift.tensors()
        return [*norms, *(each for each in values if isinstance(each, Tensor)), *shift]
