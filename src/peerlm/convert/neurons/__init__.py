"""A dense feed-forward layer as a pool of single-neuron experts, and the index that finds the few that matter."""

from peerlm.convert.neurons.fit import fit_neurons
from peerlm.convert.neurons.index import IndexFit, fit_index
from peerlm.convert.neurons.layer import NeuronLayer, neuron_layer, neuron_layer_skeleton, pool_tables
from peerlm.convert.neurons.weights import Neurons, neurons_of

__all__ = [
    "IndexFit",
    "NeuronLayer",
    "Neurons",
    "fit_index",
    "fit_neurons",
    "neuron_layer",
    "neuron_layer_skeleton",
    "neurons_of",
    "pool_tables",
]
