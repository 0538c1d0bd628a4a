"""The hidden neurons of a dense feed-forward layer: what they read, what they write, and what they add up to.

Shape suffixes: T tokens, D model width, F hidden neurons.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from peerlm.layers import DenseFFW
from peerlm.ops.functions import ACTIVATIONS


@dataclass(frozen=True, kw_only=True)
class Neurons:
    """A dense feed-forward layer, neuron by neuron: y = sum over f of a_f v_f + output_bias.

    With a_f = act(u_f . x + b_f), or if gated (u_f . x + b_f) act(g_f . x + c_f).
    """

    activation: str
    """A name in `ACTIVATIONS`; of gated neurons, what is applied to the gate."""
    down: Tensor
    """u, (F, D): the vectors that neurons read with."""
    up: Tensor
    """v, (F, D): the vectors that neurons write."""
    gate: Tensor | None = None
    """g, (F, D); None where neurons are not gated."""
    down_bias: Tensor | None = None
    """b, (F,)."""
    gate_bias: Tensor | None = None
    """c, (F,)."""
    output_bias: Tensor | None = None
    """(D,), added once."""

    def activations(self, x_TD: Tensor) -> Tensor:
        """What each neuron multiplies its v by: (T, F)."""
        read_TF = F.linear(x_TD, self.down, self.down_bias)
        act = ACTIVATIONS[self.activation]
        if self.gate is None:
            return act(read_TF)
        return read_TF * act(F.linear(x_TD, self.gate, self.gate_bias))

    def __call__(self, x_TD: Tensor) -> Tensor:
        """The layer's output, (T, D)."""
        return F.linear(self.activations(x_TD), self.up.T, self.output_bias)

    def importance(self, x_TD: Tensor) -> Tensor:
        """How much each neuron adds to the output, |a_f| times the length of v_f: (T, F)."""
        return self.activations(x_TD).abs() * self.up.norm(dim=-1)


def neurons_of(layer: DenseFFW) -> Neurons:
    """The neurons of one of our own dense layers; tensors share its memory and have no gradients."""
    return Neurons(
        activation=layer.activation,
        down=layer.down_proj.weight.detach(),
        up=layer.up_proj.weight.detach().T,
        gate=None if layer.gate_proj is None else layer.gate_proj.weight.detach(),
    )
