"""One rule for the output scale of a feed-forward layer before training, so that it needs no tuning.

For inputs of unit mean square (as after RMSNorm) every layer here starts with an output of mean square
`OUTPUT_POWER`: that of a dense GELU FFW whose two matrices are N(0, 1 / fan_in). A layer sums terms `weight *
activation * vector`; with `weight_power` the expected sum of squared weights and E[act(z)^2] over a normal z, the
vectors' standard deviation follows.
"""

import math

# Standard deviation of what goes into an activation at the start, where it is not 1. A neuron of 1 + z starts as little
# more than a memory's value, and learns from there how it depends on the token.
INPUT_STD = {"one_plus": 0.1}

# E[act(z)^2] for z ~ N(0, INPUT_STD^2); a gated neuron multiplies by an independent factor of power 1.
ACTIVATION_POWER = {
    "gelu": 0.42522,
    "gelu_tanh": 0.42519,
    "relu": 0.5,
    "silu": 0.35578,
    "identity": 1.0,
    "one_plus": 1.01,
}

OUTPUT_POWER = ACTIVATION_POWER["gelu"]


def input_std(dim: int, activation: str = "identity") -> float:
    """Standard deviation of the input vectors of activated neurons, for inputs of `dim` features.

    Args:
        dim: width of the input, of unit mean square.
        activation: a name in `ACTIVATION_POWER`.
    """
    return INPUT_STD.get(activation, 1.0) * dim**-0.5


def output_std(weight_power: float, activation: str = "identity") -> float:
    """Standard deviation of the output vectors that gives the layer an output of mean square `OUTPUT_POWER`.

    Args:
        weight_power: expected sum of squared weights over the terms of one token's sum.
        activation: what multiplies each weight, a name in `ACTIVATION_POWER`.
    """
    return math.sqrt(OUTPUT_POWER / (weight_power * ACTIVATION_POWER[activation]))
