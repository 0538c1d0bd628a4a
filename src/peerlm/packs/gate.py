"""The gate of a pack: decides for each token whether the pack speaks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OPEN = 20.0
"""The bias of a gate that is not fitted: its sigmoid is 1 in float32."""
_DECAY = 1e-2
_ITERATIONS = 60


class Gate(nn.Module):
    """A logistic regression on what a feed-forward layer reads: the probability that a token is of the pack's own text.

    Where it is at most 1/2, the pack adds nothing at all, and is not computed; above, its output is multiplied by it.
    A new gate is open everywhere.

    Args:
        dim: width of the hidden states.

    Attributes:
        weight: (dim,) float32. It is fitted in closed form (`fit`), not by the optimizer.
        bias: () float32.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("weight", torch.zeros(dim, dtype=torch.float32))
        self.register_buffer("bias", torch.tensor(OPEN, dtype=torch.float32))

    def forward(self, x_TD: Tensor) -> Tensor:
        """X (T, dim) -> (T,) float32 in [0, 1], 0 where the pack is silent."""
        with torch.autocast(x_TD.device.type, enabled=False):  # it must open for the same tokens at any precision
            share_T = torch.sigmoid(x_TD.float() @ self.weight + self.bias)
        return share_T.masked_fill(share_T <= 0.5, 0.0)

    @torch.no_grad()
    def fit(self, own_TD: Tensor, other_TD: Tensor, *, keep: float = 0.97) -> None:
        """Tell the pack's own text from other text; both count as much, however many tokens they have.

        Args:
            own_TD: what the layer reads of tokens of the pack's text, any float dtype.
            other_TD: of tokens of other text.
            keep: share of the own tokens for which the pack speaks at the most; the least certain ones are given up, so
                that foreign text opens the gate less often. Where regression alone opens it for fewer, that holds.
        """
        with torch.autocast(own_TD.device.type, enabled=False):
            self._fit(own_TD.float(), other_TD.float(), keep)

    def _fit(self, own: Tensor, other: Tensor, keep: float) -> None:
        mean = (own.mean(dim=0) + other.mean(dim=0)) / 2
        spread = ((own - mean).square().mean(dim=0) + (other - mean).square().mean(dim=0)).div(2).sqrt()
        spread = spread.clamp_min(1e-6)
        own, other = (own - mean) / spread, (other - mean) / spread
        weight = torch.zeros_like(mean).requires_grad_()
        bias = torch.zeros_like(mean[:1]).requires_grad_()
        search = torch.optim.LBFGS([weight, bias], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            search.zero_grad()
            with torch.enable_grad():
                total = F.softplus(-(own @ weight + bias)).mean() + F.softplus(other @ weight + bias).mean()
                total = total + _DECAY * weight.square().sum()
            total.backward()
            return total

        search.step(loss)
        scores = own @ weight + bias
        lowest = scores.kthvalue(max(1, round((1 - keep) * len(scores)))).values.clamp_min(0)
        self.weight.copy_(weight / spread)
        self.bias.copy_((bias - lowest - (weight / spread) @ mean).reshape(()))
