"""The transformer's dense feed-forward layer."""

from torch import Tensor, nn

from peerlm.layers.checks import check_sizes, flatten_tokens
from peerlm.layers.output_scale import input_std, output_std
from peerlm.ops import api
from peerlm.ops.functions import ACTIVATIONS


class DenseFFW(nn.Module):
    """The transformer's feed-forward layer: act(x W) V, or ((x W) * act(x G)) V if gated (GLU; Shazeer 2020).

    Without biases.

    Args:
        dim: width of input and output.
        hidden: hidden neurons; 4 * dim if None, or 8 / 3 * dim if gated, which is as many parameters.
        activation: "gelu", "gelu_tanh", "relu", "silu", "identity" or "one_plus".
        gated: with activation="silu" this is SwiGLU.
    """

    def __init__(self, dim: int, *, hidden: int | None = None, activation: str = "gelu", gated: bool = False):
        super().__init__()
        if hidden is None:
            hidden = round(8 / 3 * dim) if gated else 4 * dim
        check_sizes(dim=dim, hidden=hidden)
        api.check_activation(activation)
        self.dim = dim
        self.activation = activation
        self.down_proj = nn.Linear(dim, hidden, bias=False)
        self.gate_proj = nn.Linear(dim, hidden, bias=False) if gated else None
        self.up_proj = nn.Linear(hidden, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self, output_scale: float = 1.0) -> None:
        """All matrices by `output_scale.py`, that of the output times `output_scale`."""
        hidden = self.up_proj.in_features
        plain, activated = input_std(self.dim), input_std(self.dim, self.activation)
        nn.init.normal_(self.down_proj.weight, std=activated if self.gate_proj is None else plain)
        if self.gate_proj is not None:
            nn.init.normal_(self.gate_proj.weight, std=activated)
        nn.init.normal_(self.up_proj.weight, std=output_scale * output_std(hidden, self.activation))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map x (..., dim) to (..., dim); every token on its own, so `mask` changes nothing."""
        flatten_tokens(x, mask, self.dim)
        act = ACTIVATIONS[self.activation]
        hidden = self.down_proj(x)
        hidden = act(hidden) if self.gate_proj is None else hidden * act(self.gate_proj(x))
        return self.up_proj(hidden)
