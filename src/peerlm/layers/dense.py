"""The transformer's dense feed-forward layer."""

from collections.abc import Callable

from torch import Tensor, nn

from peerlm.layers.checks import check_sizes, flatten_tokens
from peerlm.layers.one_call import Prepared, in_one_call, nobody_looks_on, where
from peerlm.layers.output_scale import input_std, output_std
from peerlm.ops import api
from peerlm.ops.functions import ACTIVATIONS
from peerlm.ops.whole_layer import DenseLayer


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
        self._prepared = Prepared()
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
        if (y := in_one_call(self, x, mask)) is not None:
            return y
        flatten_tokens(x, mask, self.dim)
        act = ACTIVATIONS[self.activation]
        hidden = self.down_proj(x)
        hidden = act(hidden) if self.gate_proj is None else hidden * act(self.gate_proj(x))
        return self.up_proj(hidden)

    def few_tokens_call(self) -> Callable[[Tensor], Tensor | None] | None:
        """What maps a few tokens (..., dim) in one call, without gradients and where nothing else looks on; or None.

        It depends on what `one_call.Unchanged` sees of the layer and its parts.
        """
        modules = self._modules
        maps = [modules["down_proj"], modules.get("gate_proj"), modules["up_proj"]]
        present = [each for each in maps if each is not None]
        if any(type(each) is not nn.Linear or each._parameters["bias"] is not None for each in present):
            return None
        if not nobody_looks_on(*present):
            return None
        weights = [None if each is None else each._parameters["weight"] for each in maps]
        state = *where(weights), self.activation
        if self._prepared.state != state:
            down, gate, up = weights
            assert down is not None
            assert up is not None
            layer = DenseLayer(down=down, gate=gate, up=up, activation=self.activation)
            self._prepared.call = api.whole_layer(layer)
            self._prepared.state = state
        return self._prepared.call
