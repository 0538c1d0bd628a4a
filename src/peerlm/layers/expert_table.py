"""The experts' rows, and the look-up that sharding, quantisation and offloading replace."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peerlm.layers.output_scale import input_std
from peerlm.layers.row_table import RowTable, empty_rows
from peerlm.ops import api
from peerlm.ops.row_updates import prepare_rows, wants_row_gradients

ROW_FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


class ExpertTable(RowTable):
    """N single-neuron experts `act(u . x) v`, or `(u . x) act(g . x) v` if gated (He 2024, section 2.1).

    Args:
        num_experts: N.
        dim: width of input and output.
        activation: "gelu", "gelu_tanh", "relu", "silu", "identity" or "one_plus".
        gated: whether experts have a gate vector.
        backend: a name in `peerlm.ops.api.BACKENDS`.
        row_format: "float32" (torch's default dtype, should that be another), "bfloat16", or "int8" with a scale for
            each vector; int8 rows are not trained.
        up_std: standard deviation of v at the start.

    Attributes:
        rows: u, v and, if gated, g of each expert side by side, (num_experts, 2 or 3, dim).
        scales: what each vector of int8 rows is multiplied by, (num_experts, 2 or 3) float32; otherwise None.
    """

    parameter_roles: ClassVar[dict[str, str]] = {"rows": "table"}
    scales: Tensor | None

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
        super().__init__()
        api.check_activation(activation)
        api.check_backend(backend)
        self.num_experts = num_experts
        self.dim = dim
        self.activation = activation
        self.gated = gated
        self.backend = backend
        dtype = _row_dtype(row_format)
        if dtype == torch.float32:
            dtype = torch.get_default_dtype()
        parts = 3 if gated else 2
        rows = empty_rows(num_experts, parts, dim, dtype=dtype)
        self.rows = nn.Parameter(rows, requires_grad=dtype.is_floating_point)
        self.register_buffer("scales", None if dtype.is_floating_point else torch.empty(num_experts, parts))
        self.reset_parameters(up_std)

    def reset_parameters(self, up_std: float = 1.0) -> None:
        """u, g ~ N(0, 1 / dim), what is activated by `output_scale.py`; v ~ N(0, up_std^2)."""
        if self.rows.is_meta or getattr(self.rows, "_is_hf_initialized", False):
            return  # transformers marks what it has loaded
        with torch.no_grad():
            if self.scales is None:
                self._fill(self.rows, up_std)
            else:
                rows = torch.empty(self.rows.shape, device=self.rows.device)
                self._fill(rows, up_std)
                for target, value in zip((self.rows, self.scales), quantise(rows), strict=True):
                    target.copy_(value)

    def input_stds(self) -> dict[int, float]:
        """Standard deviation at the start of the vectors that meet the input, u and, if gated, g, by place in a row."""
        activated = input_std(self.dim, self.activation)
        return {0: input_std(self.dim), 2: activated} if self.gated else {0: activated}

    def _fill(self, rows: Tensor, up_std: float) -> None:
        drawn = input_std(self.dim)
        rows.normal_(std=drawn)
        for vector, std in {**self.input_stds(), 1: up_std}.items():
            if std != drawn:
                rows[:, vector].mul_(std / drawn)

    @property
    def row_format(self) -> str:
        """A name in `ROW_FORMATS`, or of another dtype that the module was cast to."""
        return str(self.rows.dtype).removeprefix("torch.")

    @torch.no_grad()
    def convert_rows(self, row_format: str) -> None:
        """Store the rows in another format from now on; a training table's optimizer must be built anew."""
        dtype = _row_dtype(row_format)
        if dtype == self.rows.dtype:
            return
        prepare_rows(self.rows, None)
        wide = self.rows.float() if self.scales is None else self.rows * self.scales[..., None]
        rows, self.scales = (wide.to(dtype), None) if dtype.is_floating_point else quantise(wide)
        self.rows = nn.Parameter(empty_rows(*rows.shape, dtype=dtype).to(rows.device), dtype.is_floating_point)
        self.rows.copy_(rows)

    @property
    def down(self) -> Tensor:
        """u, (num_experts, dim): a view of the rows, or of int8 rows a float32 copy."""
        return self._part(0)

    @property
    def up(self) -> Tensor:
        """v, as `down`."""
        return self._part(1)

    @property
    def gate(self) -> Tensor | None:
        """g, as `down`; None if not gated."""
        return self._part(2) if self.gated else None

    def _part(self, which: int) -> Tensor:
        prepare_rows(self.rows, None)
        part = self.rows[:, which]
        return part if self.scales is None else part * self.scales[:, which, None]

    def forward(self, x: Tensor, weights: Tensor, expert_ids: Tensor) -> Tensor:
        """Mix each token's experts: x (T, dim), weights and expert_ids (T, P) -> (T, dim)."""
        prepare_rows(self.rows, expert_ids)
        return api.mix_experts(
            x,
            weights,
            expert_ids,
            self.rows,
            self.scales,
            activation=self.activation,
            backend=self.backend,
            row_gradients=wants_row_gradients(self.rows),
        )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *lists: list[str],
    ) -> None:
        """As in `nn.Module`, but saved rows of any format become rows of this table's."""
        rows, scales = state_dict.get(prefix + "rows"), state_dict.get(prefix + "scales")
        if rows is not None and rows.dtype.is_floating_point and self.scales is not None:
            state_dict[prefix + "rows"], state_dict[prefix + "scales"] = quantise(rows.float())
        elif rows is not None and rows.dtype == torch.int8 and self.scales is None:
            if scales is None:
                missing_keys.append(prefix + "scales")
                del state_dict[prefix + "rows"]
            else:
                state_dict[prefix + "rows"] = rows * state_dict.pop(prefix + "scales")[..., None]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *lists)

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        return (
            f"num_experts={self.num_experts}, dim={self.dim}, activation={self.activation!r}, gated={self.gated}, "
            f"row_format={self.row_format!r}, backend={self.backend!r}"
        )


def _row_dtype(row_format: str) -> torch.dtype:
    if row_format not in ROW_FORMATS:
        raise ValueError(f"row_format is {row_format!r}; choose one of {', '.join(ROW_FORMATS)}")
    return ROW_FORMATS[row_format]


def quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """int8 rows and scales of rows (N, R, D): each vector's largest entry becomes 127."""
    scales = rows.abs().amax(dim=-1) / 127
    safe = torch.where(scales > 0, scales, 1.0)
    return (rows / safe[..., None]).round().to(torch.int8), scales
