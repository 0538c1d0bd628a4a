"""A dense feed-forward layer as a pool of single-neuron experts, of which an index retrieves a few for each token.

Shape suffixes: T tokens, D model width, F hidden neurons of the dense layer, N >= F places for neurons, R vectors in a
row (u, v and, if gated, g; of an index "reads", g and v), K neurons retrieved per token.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peerlm.convert.neurons.keys import NeuronKeys
from peerlm.convert.neurons.reads import NeuronReads
from peerlm.convert.neurons.weights import Neurons
from peerlm.layers import ExpertTable, Table
from peerlm.layers.checks import check_settings, check_sizes, flatten_tokens
from peerlm.layers.output_scale import output_std

BIAS_WIDTH = 8
"""What rows are wider than the model where neurons have biases: the input's extra features are 1, 0, 0, ..."""
INDEX_SETTINGS = {"keys": ("heads", "key_dim"), "reads": ("sketch",)}
"""The kinds of index, and the settings that each of them has alone."""


class NeuronLayer(nn.Module):
    """y = sum over retrieved neurons of a_f v_f + output_bias + mean_rest.

    With all neurons retrieved this is the dense layer, to rounding: weights are 1 (of an index "reads" what neurons
    read), a bias in a row is part of its vector (the input gets a feature that is always 1), places without a neuron
    hold zeros. `mean_rest` is a constant estimate of what the neurons not retrieved would have added.

    Args:
        dim: width of input and output.
        hidden: F, neurons of the dense layer.
        activation: "gelu", "gelu_tanh", "relu", "silu", "identity" or "one_plus".
        gated: whether neurons are gated.
        biases: whether neurons have read or gate biases.
        share: share of the neurons that a token retrieves, above 0, at most 1.
        heads: of an index "keys"; each owns a part of the neurons.
        key_dim: of an index "keys", size of a head's query, even.
        index: "keys", product keys (`NeuronKeys`), which are cheap; or "reads" (`NeuronReads`), which takes gated
            neurons, computes what all of them read, and needs far fewer of them.
        sketch: of an index "reads", rank of the estimate of gates; 0 for none.
        backend: a name in `peerlm.ops.api.BACKENDS`.

    Attributes:
        index: `NeuronKeys` or `NeuronReads`, random until `fit_index` has learned it.
        experts: the rows, `ExpertTable`; None where `pool_tables` moved them to another layer's.
        output_bias: (dim,).
        mean_rest: (dim,), a buffer; zero until `fit_index` or `center` has measured it.

    Raises:
        ValueError: a setting is impossible; the message has the setting, its value, and the fix.
    """

    mean_rest: Tensor

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        activation: str = "gelu",
        gated: bool = False,
        biases: bool = False,
        share: float = 0.2,
        heads: int = 8,
        key_dim: int = 16,
        index: str = "keys",
        sketch: int = 64,
        backend: str = "auto",
    ):
        super().__init__()
        check_sizes(dim=dim, hidden=hidden, heads=heads)
        self.dim = dim
        self.hidden = hidden
        self.width = dim + BIAS_WIDTH if biases else dim
        self.gated = gated
        self.index: NeuronKeys | NeuronReads
        if index == "keys":
            sub_keys = _ceil_sqrt(-(-hidden // heads))
            self.index = NeuronKeys(dim, sub_keys=sub_keys, heads=heads, retrieved=1, key_dim=key_dim, backend=backend)
        elif index == "reads" and gated:
            self.index = NeuronReads(dim, hidden, retrieved=1, sketch=sketch, activation=activation, biases=biases)
        else:
            fix = "it takes gated neurons, and these have no gate" if index in INDEX_SETTINGS else "there is none such"
            raise ValueError(f"index is {index!r}, but {fix}; choose {' or '.join([*INDEX_SETTINGS][: 1 + gated])}")
        self.experts: ExpertTable | None = ExpertTable(
            self.index.num_experts,
            self.width,
            activation=activation,
            gated=gated and index == "keys",
            backend=backend,
        )
        self._elsewhere: tuple[ExpertTable, ...] = ()  # a tuple, so that the table is not registered twice
        self._first_row = 0
        self.output_bias = nn.Parameter(torch.empty(dim))
        self.register_buffer("mean_rest", torch.empty(dim))
        self.share = share
        self.reset_parameters()

    @property
    def share(self) -> float:
        """Share of the neurons that a token retrieves; may be set at any time, then `mean_rest` is to be measured."""
        return self._share

    @share.setter
    def share(self, share: float) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share is {share}; it is the share of neurons that a token retrieves: 0 < share <= 1")
        self._share = share
        # Places without a neuron are retrieved too when everything is.
        self.index.retrieved = self.num_places if share == 1 else max(1, round(share * self.hidden))

    @property
    def num_places(self) -> int:
        """N, the rows of this layer: its neurons, and zeros that fill the index's squares."""
        return self.index.num_experts

    @property
    def table(self) -> ExpertTable:
        """The rows, where `first_row` is this layer's first."""
        return self._elsewhere[0] if self.experts is None else self.experts

    @property
    def first_row(self) -> int:
        """Where this layer's rows begin in the table."""
        return self._first_row

    def reset_parameters(self, output_scale: float = 1.0) -> None:
        """A random index, and random neurons at a dense layer's scale (`output_scale.py`) times `output_scale`."""
        self.index.reset_parameters()
        if self.experts is not None:
            std = output_scale * output_std(self.index.retrieved, self.table.activation)
            self.experts.reset_parameters(std)
        nn.init.zeros_(self.output_bias)
        nn.init.zeros_(self.mean_rest)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map x (..., dim) to (..., dim); every token on its own, so that `mask` only keeps padding out of usage."""
        x_TD, _ = flatten_tokens(x, mask, self.dim)
        weights_TK, ids_TK = (part.flatten(-2).flatten(0, -2) for part in self.index(x, mask))
        y_TD = self.mix(x_TD, weights_TK, ids_TK) + (self.output_bias + self.mean_rest).to(x.dtype)
        return y_TD.view(x.shape)

    def mix(self, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        """The weighted sum of these neurons alone, (T, D); ids count from this layer's first row."""
        if self.width > self.dim:
            x_TD = F.pad(F.pad(x_TD, (0, 1), value=1.0), (0, self.width - self.dim - 1))
        return self.table(x_TD, weights_TK, ids_TK + self._first_row)[:, : self.dim]

    def rows(self) -> Tensor:
        """This layer's rows, (N, R, width): a view of the table where it can be one."""
        return self.table.read(self._first_row, self.num_places)

    def neurons(self) -> Neurons:
        """The layer as dense neurons, place by place, zeros included; views without gradients of its own weights."""
        parts: dict[str, Tensor] = self.index.reads() if isinstance(self.index, NeuronReads) else {}
        for name, vectors in zip(self._row_names(), self.rows().detach().unbind(1), strict=True):
            parts[name] = vectors[:, : self.dim]
            if self.width > self.dim and name != "up":
                parts[f"{name}_bias"] = vectors[:, self.dim]
        return Neurons(activation=self.table.activation, output_bias=self.output_bias.detach(), **parts)

    def _row_names(self) -> tuple[str, ...]:
        """What the vectors of a row are, by their names in `Neurons`."""
        return ("gate", "up") if isinstance(self.index, NeuronReads) else ("down", "up", "gate")[: 2 + self.gated]

    @torch.no_grad()
    def load_neurons(self, neurons: Neurons) -> None:
        """Take these neurons' weights, in their order, at the first places; the others become zeros.

        Raises:
            ValueError: they are of another number, width, activation or kind.
        """
        biased = neurons.down_bias is not None or neurons.gate_bias is not None
        theirs = (*neurons.down.shape, neurons.activation, neurons.gate is not None)
        ours = (self.hidden, self.dim, self.table.activation, self.gated)
        if theirs != ours or (biased and self.width == self.dim):
            names = ("neurons", "width", "activation", "gated", "biases")
            described = [
                ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))
                for values in ((*theirs, biased), (*ours, self.width > self.dim))
            ]
            raise ValueError(f"neurons to load have {described[0]}; this layer has {described[1]}: build it like them")
        rows = torch.zeros(self.num_places, *self.table.row_shape, dtype=self.table.dtype, device=self.table.device)
        for part, name in enumerate(self._row_names()):
            rows[: self.hidden, part, : self.dim] = getattr(neurons, name).to(rows)
            bias = getattr(neurons, f"{name}_bias", None)
            if bias is not None:
                rows[: self.hidden, part, self.dim] = bias.to(rows)
        self.table.write(rows, self._first_row)
        if isinstance(self.index, NeuronReads):
            self.index.load_reads(neurons)
        if neurons.output_bias is None:
            self.output_bias.zero_()
        else:
            self.output_bias.copy_(neurons.output_bias)

    @torch.no_grad()
    def place(self, order_N: Tensor) -> None:
        """Move neurons: place p gets what was at place order_N[p], a permutation of all N."""
        self.table.write(self.rows()[order_N], self._first_row)
        if isinstance(self.index, NeuronReads):
            self.index.place(order_N)

    def retrieved_mask(self, x_TD: Tensor) -> Tensor:
        """Which neurons these inputs retrieve: (T, N) bool."""
        _, ids = self.index(x_TD)
        retrieved_TN = torch.zeros(len(x_TD), self.num_places, dtype=torch.bool, device=x_TD.device)
        return retrieved_TN.scatter_(1, ids.flatten(1), value=True)

    @torch.no_grad()
    def center(self, x_TD: Tensor, batch_size: int = 4096) -> None:
        """Measure `mean_rest`: what the neurons that these inputs do not retrieve would have added, on average."""
        neurons = self.neurons()
        rest_N = torch.zeros(self.num_places, dtype=torch.float64, device=x_TD.device)
        for batch_TD in x_TD.split(batch_size):
            rest_TN = neurons.activations(batch_TD).masked_fill_(self.retrieved_mask(batch_TD), 0.0)
            rest_N += rest_TN.double().sum(dim=0)
        self.mean_rest.copy_((rest_N / len(x_TD)) @ neurons.up.double())

    def extra_flops_per_token(self, context: int) -> int:
        """Forward FLOPs of the retrieved neurons; the index counts itself."""
        return 2 * self.table.row_shape[0] * self.width * self.index.retrieved

    def inactive_parameters(self) -> int:
        """Parameters of neurons that one token leaves untouched."""
        return self.table.row_shape[0] * self.width * (self.num_places - self.index.retrieved)

    def looked_up_rows(self) -> list[tuple[Table, int]]:
        """The table, which other layers may share, and how many rows of it a token looks up here."""
        return [(self.table, self.index.retrieved)]

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        return f"dim={self.dim}, hidden={self.hidden}, share={self.share}, first_row={self.first_row}"


def check_neuron_settings(settings: Mapping[str, Any]) -> None:
    """Raise a ValueError for the first of these that is no setting of `NeuronLayer`, besides what its neurons say.

    Also for one that belongs to another kind of index, which would not read it.
    """
    from_neurons = ("dim", "hidden", "activation", "gated", "biases")
    check_settings(NeuronLayer, "a layer of retrieved neurons", settings, besides=from_neurons)
    index = settings.get("index", "keys")
    for kind, names in INDEX_SETTINGS.items():
        for name in names:
            if name in settings and index in INDEX_SETTINGS and index != kind:
                raise ValueError(f"{name} is a setting of index={kind!r}, and the index is {index!r}; leave it out")


def neuron_layer_skeleton(
    dim: int, hidden: int, activation: str, gated: bool, biases: bool, settings: Mapping[str, Any]
) -> NeuronLayer:
    """A layer for as many neurons, random in index and neurons; under `torch.device("meta")` without memory.

    Args:
        dim, hidden, activation, gated, biases: as for `NeuronLayer`.
        settings: the layer's other arguments by name, ready for JSON.

    Raises:
        ValueError: an unknown or impossible setting.
    """
    check_neuron_settings(settings)
    return NeuronLayer(dim, hidden, activation=activation, gated=gated, biases=biases, **settings)


def neuron_layer(neurons: Neurons, settings: Mapping[str, Any]) -> NeuronLayer:
    """A layer that holds these neurons, in their dtype and on their device, under a random index.

    `fit_index` then learns the index. `settings` and errors as `neuron_layer_skeleton`.
    """
    hidden, dim = neurons.down.shape
    biases = neurons.down_bias is not None or neurons.gate_bias is not None
    layer = neuron_layer_skeleton(dim, hidden, neurons.activation, neurons.gate is not None, biases, settings)
    layer.to(device=neurons.down.device, dtype=neurons.down.dtype)
    layer.load_neurons(neurons)
    return layer


@torch.no_grad()
def pool_tables(layers: Sequence[NeuronLayer]) -> None:
    """Move the rows of all these layers into one table, which the first one owns; each keeps its index over its rows.

    A state dict of a model that holds the layers then has one table. Skeletons may be pooled before weights are loaded.

    Raises:
        ValueError: fewer than two layers, one that is pooled already, or layers whose rows differ in kind.
    """
    if len(layers) < 2:
        raise ValueError(f"{len(layers)} layers to pool; give at least two")
    kinds = {
        (layer.table.activation, layer.table.gated, layer.width, layer.table.backend, layer.table.dtype)
        for layer in layers
    }
    if len(kinds) > 1:
        kinds_text = "; ".join(sorted(map(str, kinds)))
        raise ValueError(f"layers to pool differ in activation, gate, width, backend or dtype: {kinds_text}")
    if len({id(layer.table) for layer in layers}) < len(layers) or any(layer.experts is None for layer in layers):
        raise ValueError("some of the layers to pool share a table already; pool all of them in one call")
    first = layers[0].table
    first.append([layer.table for layer in layers[1:]])
    first_row = 0
    for layer in layers:
        layer._first_row = first_row
        first_row += layer.num_places
        if layer is not layers[0]:
            layer.experts, layer._elsewhere = None, (first,)


def _ceil_sqrt(number: int) -> int:
    return math.isqrt(number - 1) + 1
