"""The layer that peft puts in place of a target module: the module, and beside it the pools of its adapters."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peerlm.adapters.pool import AdapterPool

CANNOT_MERGE = (
    "an adapter of retrieved experts cannot be merged into weights, because each token retrieves its own; keep it "
    "beside the model, or call unload() for the model without it"
)


class PeerAdapterLayer(nn.Module, BaseTunerLayer):
    """A frozen module and, by adapter name, the `AdapterPool`s whose outputs are added to its own.

    Args:
        base_layer: what is adapted: maps (..., in_features) to (..., out_features), further arguments are passed on.
        in_features, out_features: its widths.
    """

    # ModuleDicts that peft looks through for an adapter's weights; their name begins with the method's prefix.
    adapter_layer_names: ClassVar[tuple[str, ...]] = ("peer_adapter_pools",)  # type: ignore[misc]

    def __init__(self, base_layer: nn.Module, in_features: int, out_features: int):
        super().__init__()
        self.base_layer = base_layer
        self.in_features = in_features
        self.out_features = out_features
        self.peer_adapter_pools = nn.ModuleDict()
        self.merged_adapters: list[str] = []

    def add_pool(self, adapter_name: str, *, inference_mode: bool, **settings: Any) -> None:
        """A new adapter, on the device and in the dtype of the base layer; `settings` are those of `AdapterPool`."""
        pool = AdapterPool(self.in_features, self.out_features, **settings)
        check_adapter_name(adapter_name, pool)
        self.peer_adapter_pools[adapter_name] = pool
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        """As in peft, and for a module without a `weight` those of its first float parameter."""
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        if device is None:
            first = next((p for p in base_layer.parameters() if p.is_floating_point()), None)
            if first is not None:
                device, dtype = first.device, first.dtype
        return device, dtype

    def forward(self, x: Tensor, *arguments: Any, adapter_names: Sequence[str] | None = None, **options: Any) -> Tensor:
        """The base layer's output plus those of the active adapters, in its dtype.

        Args:
            x: (..., in_features).
            arguments, options: of the base layer.
            adapter_names: instead of the active ones, one for each row of x (x.shape[0]); "__base__" is none, and so
                is one that this layer does not have.

        Raises:
            TypeError: the base layer gives something other than one tensor.
            ValueError: the widths of its input or output are not those that the adapter was made for; or there are more
                or fewer names than rows.
        """
        result = self.base_layer(x, *arguments, **options)
        if self.disable_adapters:
            return result
        if adapter_names is None:
            for name in self.active_adapters:
                if name in self.peer_adapter_pools:
                    self._check_result(x, result)
                    result = result + self.peer_adapter_pools[name](x).to(result.dtype)
            return result
        check_number_of_names(adapter_names, x)
        for name in self.peer_adapter_pools.keys() & set(adapter_names):
            self._check_result(x, result)
            rows = torch.tensor([row for row, of_row in enumerate(adapter_names) if of_row == name], device=x.device)
            added = self.peer_adapter_pools[name](x[rows]).to(result.dtype)
            result = result.index_add(0, rows, added)
        return result

    def _check_result(self, x: Tensor, result: object) -> None:
        if not isinstance(result, Tensor):
            raise TypeError(
                f"{type(self.base_layer).__name__} gives a {type(result).__name__}, and an adapter can only be added "
                "to a tensor; name other target_modules"
            )
        if result.shape != (*x.shape[:-1], self.out_features):
            raise ValueError(
                f"{type(self.base_layer).__name__} maps {tuple(x.shape)} to {tuple(result.shape)}, but its adapter "
                f"{self.in_features} to {self.out_features} features: set module_dim in the configuration"
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Always raises a ValueError."""
        raise ValueError(CANNOT_MERGE)

    def unmerge(self) -> None:
        """Nothing is ever merged."""


class PeerAdapterLinear(PeerAdapterLayer):
    """Over a linear layer: by "Linear" in the name peft finds what "all-linear" means for a second adapter."""


def check_number_of_names(adapter_names: Sequence[str], x: Tensor) -> None:
    """Raise a ValueError, in the words of peft, where there is not one name for each row of x."""
    if len(adapter_names) != len(x):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(adapter_names)} and {len(x)} respectively."
        )


def check_adapter_name(name: str, pool: AdapterPool) -> None:
    """Raise a ValueError for a name that peft could not tell from a part of the pool in the keys of a state dict."""
    parts = {part for path, _ in (*pool.named_parameters(), *pool.named_buffers()) for part in path.split(".")}
    if name in parts:
        raise ValueError(f"an adapter cannot be named {name!r}, which is a part of every adapter; take another name")
