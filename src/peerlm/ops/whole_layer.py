"""What a feed-forward layer does to a few tokens, as one call of a backend."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class WholeLayer:
    """The numbers of a layer of experts; H heads, C half of a query's width, n sub-keys per half, D the width."""

    query_map: Tensor
    """(H * 2 C, D)."""
    norm: str
    """Of queries: "none"; "batch", by running statistics; or "layer", over each head's query."""
    norms: Sequence[Tensor]
    """Of a batch norm mean, variance, weight and bias, each (H * 2 C); of a layer norm weight and bias, each (2 C)."""
    epsilon: float
    sub_keys: Tensor
    """(2, H or 1, n, C)."""
    key_length: float
    """What sub-keys are normalised to; 0: they stay as they are."""
    k: int
    weighting: str
    pairing: str
    weight_scale: float
    rows: Tensor
    """(n * n, 2 or 3, D)."""
    scales: Tensor | None
    activation: str

    def tensors(self) -> list[Tensor]:
        """All tensors but the rows, which all are in float32."""
        scales = [] if self.scales is None else [self.scales]
        return [self.query_map, *self.norms, self.sub_keys, *scales]


@dataclass(frozen=True, kw_only=True)
class DenseLayer:
    """The numbers of a dense layer without biases; F hidden neurons, D the width."""

    down: Tensor
    """(F, D)."""
    gate: Tensor | None
    """(F, D), or None."""
    up: Tensor
    """(D, F)."""
    activation: str

    def tensors(self) -> list[Tensor]:
        """All tensors, which all are in float32."""
        return [self.down, self.up, *([] if self.gate is None else [self.gate])]
