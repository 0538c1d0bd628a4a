"""The layer that peft puts in place of a target module: the module, and beside it the pools of its adapters."""

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

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """The base layer's output plus those of the active adapters, in its dtype.

        Raises:
            TypeError: the base layer gives something other than one tensor.
            ValueError: the widths of its input or output are not those that the adapter was made for.
        """
        result = self.base_layer(x, *arguments, **options)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name not in self.peer_adapter_pools:
                continue
            if not isinstance(result, Tensor):
                raise TypeError(
                    f"{type(self.base_layer).__name__} gives a {type(result).__name__}, and an adapter can only be "
                    "added to a tensor; name other target_modules"
                )
            if result.shape != (*x.shape[:-1], self.out_features):
                raise ValueError(
                    f"{type(self.base_layer).__name__} maps {tuple(x.shape)} to {tuple(result.shape)}, but its adapter "
                    f"{self.in_features} to {self.out_features} features: set module_dim in the configuration"
                )
            result = result + self.peer_adapter_pools[name](x).to(result.dtype)
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Always raises a ValueError."""
        raise ValueError(CANNOT_MERGE)

    def unmerge(self) -> None:
        """Nothing is ever merged."""


def check_adapter_name(name: str, pool: AdapterPool) -> None:
    """Raise a ValueError for a name that peft could not tell from a part of the pool in the keys of a state dict."""
    parts = {part for path, _ in (*pool.named_parameters(), *pool.named_buffers()) for part in path.split(".")}
    if name in parts:
        raise ValueError(f"an adapter cannot be named {name!r}, which is a part of every adapter; take another name")
