"""A dense layer's neurons are the layer."""

import pytest
import torch

from peerlm.convert.neurons.weights import neurons_of
from peerlm.layers import DenseFFW
from peerlm.ops.functions import ACTIVATIONS


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_neurons_of_a_dense_layer_add_up_to_its_output(activation: str, gated: bool) -> None:
    layer, x = DenseFFW(6, hidden=10, activation=activation, gated=gated).double(), torch.randn(7, 6).double()
    torch.testing.assert_close(neurons_of(layer)(x), layer(x).detach())


def test_importance_is_the_length_of_what_a_neuron_adds() -> None:
    layer, x = DenseFFW(6, hidden=3, gated=True).double(), torch.randn(7, 6).double()
    neurons = neurons_of(layer)
    added_TFD = neurons.activations(x)[:, :, None] * neurons.up
    torch.testing.assert_close(neurons.importance(x), added_TFD.norm(dim=-1))
