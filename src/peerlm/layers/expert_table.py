"""The table of single-neuron experts: what its rows mean, and what they start as."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from peerlm.layers.one_call import where
from peerlm.layers.output_scale import input_std
from peerlm.layers.table import Table
from peerlm.ops import api
from peerlm.ops.whole_layer import WholeLayer

_ROWS_AT_ONCE = 1024


class ExpertTable(Table):
    """N single-neuron experts `act(u . x) v`, or `(u . x) act(g . x) v` if gated (He 2024, section 2.1).

    Args:
        num_experts: N.
        dim: width of input and output.
        activation: "gelu", "gelu_tanh", "relu", "silu", "identity" or "one_plus".
        gated: whether experts have a gate vector.
        backend: a name in `peerlm.ops.api.BACKENDS`.
        row_format: as in `Table`.
        up_std: standard deviation of v at the start.

    Attributes:
        rows: u, v and, if gated, g of each expert side by side, (num_experts, 2 or 3, dim).
        scales: what each vector of 8-bit rows is multiplied by, (num_experts, 2 or 3) float32; otherwise None.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        *,
        activation: str = "gelu",
        gated: bool = False,
        backend: str = "auto",
        row_format: str = "float32",
        up_std: float = 1.0,
    ):
        api.check_activation(activation)
        super().__init__(num_experts, 3 if gated else 2, dim, backend=backend, row_format=row_format)
        self.dim = dim
        self.activation = activation
        self.gated = gated
        self.reset_parameters(up_std)

    def _with_size(self, num_rows: int) -> Table:
        return self._kind(num_rows, self.dim, activation=self.activation, gated=self.gated, backend=self.backend)

    @property
    def num_experts(self) -> int:
        """N."""
        return self.num_rows

    def reset_parameters(self, up_std: float = 1.0) -> None:
        """u, g ~ N(0, 1 / dim), what is activated by `output_scale.py`; v ~ N(0, up_std^2)."""
        drawn = input_std(self.dim)
        stds = {**self._input_stds(), 1: up_std}
        self.fill_normal(drawn, {vector: std / drawn for vector, std in stds.items()})

    def fill_new(self, first: int, generator: torch.Generator) -> None:
        """Write what rows first, first + 1, ... start as when they are added: u and g as at the start, v zero."""
        count = self.num_rows - first
        seeds = iter(torch.randint(2**62, (-(-count // _ROWS_AT_ONCE),), generator=generator).tolist())

        def fill(begin: int, seed: int) -> None:
            own = torch.Generator().manual_seed(seed)
            fresh = torch.empty(min(_ROWS_AT_ONCE, self.num_rows - begin), *self.row_shape)
            fresh[:, 1] = 0
            for vector, std in self._input_stds().items():
                fresh[:, vector].normal_(std=std, generator=own)
            self.write(fresh, begin)

        self.catch_up()
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            list(threads.map(fill, range(first, self.num_rows, _ROWS_AT_ONCE), seeds))

    def _input_stds(self) -> dict[int, float]:
        """Standard deviation at the start of the vectors that meet the input, u and, if gated, g, by place in a row."""
        activated = input_std(self.dim, self.activation)
        return {0: input_std(self.dim), 2: activated} if self.gated else {0: activated}

    @property
    def down(self) -> Tensor:
        """u, (num_experts, dim): a view of the rows where they can be one, of 8-bit rows a float32 copy."""
        return self.read()[:, 0]

    @property
    def up(self) -> Tensor:
        """v, as `down`."""
        return self.read()[:, 1]

    @property
    def gate(self) -> Tensor | None:
        """g, as `down`; None if not gated."""
        return self.read()[:, 2] if self.gated else None

    def forward(self, x: Tensor, weights: Tensor, expert_ids: Tensor) -> Tensor:
        """Mix each token's experts: x (T, dim), weights and expert_ids (T, P) -> (T, dim)."""
        return self.mix(weights, expert_ids, x, activation=self.activation)

    def one_call(self) -> tuple[object, ...] | None:
        """What `whole_layer` depends on of the experts; None where rows may be stale, or lie elsewhere."""
        kind = type(self)
        if self.watched or kind._looked_up is not Table._looked_up or kind.mix is not Table.mix:
            return None
        tensors = [self._parameters["rows"], self._buffers["scales"]]
        return (*where(tensors), self.num_rows, self.activation, self.backend)

    def whole_layer(self, **index: Any) -> Callable[[Tensor], Tensor | None] | None:
        """What makes of a few tokens what a layer with these experts does, in one call; None where nothing does.

        index: the fields of `ops.whole_layer.WholeLayer` that are not of the experts.
        """
        layer = WholeLayer(rows=self.rows, scales=self.scales, activation=self.activation, **index)
        return api.whole_layer(layer, backend=self.backend)

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        return (
            f"num_experts={self.num_experts}, dim={self.dim}, activation={self.activation!r}, gated={self.gated}, "
            f"row_format={self.row_format!r}, backend={self.backend!r}"
        )
