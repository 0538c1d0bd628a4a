"""The layers that can grow, seen alike: an index of product keys, and the table of rows that it chooses from."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from peerlm.convert.record import conversion_of
from peerlm.layers import PEER, ProductKeyMemory, ProductKeys, Table
from peerlm.names import MODEL_TYPE


@dataclass(frozen=True, kw_only=True)
class IndexedLayer:
    """A PEER layer or a product-key memory."""

    name: str
    """Its path in the model; empty for the model itself."""
    module: PEER | ProductKeyMemory

    @property
    def index(self) -> ProductKeys:
        """Its index."""
        return self.module.product_keys

    @property
    def index_name(self) -> str:
        """The path of its index, by which `peerlm.usage.record_usage` calls it."""
        return f"{self.name}.product_keys".lstrip(".")

    @property
    def table(self) -> Table:
        """The experts' rows (N, 2 or 3, row_dim), or the values (N, dim)."""
        return self.module.experts if isinstance(self.module, PEER) else self.module.values

    @property
    def row_maps(self) -> tuple[nn.Module, ...]:
        """The maps by which rows that are narrower than the model read and write."""
        return (self.module.in_proj, self.module.out_proj) if isinstance(self.module, PEER) else ()

    @property
    def size_name(self) -> str:
        """What its settings call the number of rows."""
        return SIZE_NAMES[type(self.module)]

    def where(self) -> str:
        """What messages call it."""
        return f"layer {self.name!r}" if self.name else "the layer"


SIZE_NAMES: dict[type, str] = {PEER: "num_experts", ProductKeyMemory: "num_values"}


def indexed_layers(model: nn.Module) -> list[IndexedLayer]:
    """The PEER layers and product-key memories of a model, in its order."""
    modules = model.named_modules()
    return [IndexedLayer(name=name, module=each) for name, each in modules if isinstance(each, PEER | ProductKeyMemory)]


def find_indexed_layers(model: nn.Module) -> list[IndexedLayer]:
    """As `indexed_layers`; raises a ValueError where there are none."""
    layers = indexed_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no PEER layer and no product-key memory")
    return layers


def check_not_shared(model: nn.Module, layers: Sequence[IndexedLayer]) -> None:
    """Raise a ValueError where rows or sub-keys of such a layer are those of something else in the model as well.

    Layers that share their tables (`RetrievalLayer.share_tables_of`) may, if all of them are among these.
    """
    places = Counter(each for module in model.modules() for each in module._parameters.values() if each is not None)
    users = Counter(module for layer in layers for module in (layer.table, layer.index))
    for layer in layers:
        for what, module, parameters, expected in (
            ("rows", layer.table, layer.table.row_parameters(), layer.table.users),
            ("sub-keys", layer.index, [layer.index.sub_keys], 1),
        ):
            if users[module] != expected or any(places[parameter] > 1 for parameter in parameters):
                raise ValueError(
                    f"{layer.where()} shares its {what} with another part of the model, which would lose them; pass "
                    "the whole model, or give each layer a copy of its own first"
                )


def by_table(layers: Sequence[IndexedLayer]) -> list[list[IndexedLayer]]:
    """The layers in groups that look rows up in the same table."""
    groups: dict[int, list[IndexedLayer]] = {}
    for layer in layers:
        groups.setdefault(id(layer.table), []).append(layer)
    return list(groups.values())


def record_settings(model: nn.Module, num_rows: int | None = None, *, kind: type | None = None, **changes: Any) -> None:
    """Write changed settings of a model's indexed layers into its transformers configuration, if it has one.

    Args:
        model: after the change.
        num_rows: how many rows each layer has now.
        kind: PEER or ProductKeyMemory, of whose layers this holds; None for both.
        changes: other settings; those with value None no longer hold.
    """
    kinds = {type(layer.module) for layer in find_indexed_layers(model)} if kind is None else {kind}
    for each, settings, write in _settings_of(model):
        if each in kinds:
            new = settings | changes | ({} if num_rows is None else {SIZE_NAMES[each]: num_rows})
            write({key: value for key, value in new.items() if value is not None or key not in changes})


def _settings_of(model: nn.Module) -> Iterator[tuple[type, dict[str, Any], Callable[[dict[str, Any]], None]]]:
    """For each kind of layer its settings in a model's configuration, and how to replace them."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) == MODEL_TYPE:
        for kind, name in ((PEER, "peer"), (ProductKeyMemory, "pkm")):
            yield kind, getattr(config, name) or {}, lambda settings, name=name: setattr(config, name, settings)  # type: ignore[misc]
    record = conversion_of(model) if hasattr(config, "quantization_config") else None  # type: ignore[arg-type]
    if record is not None:
        yield PEER, record.settings, lambda settings: setattr(record, "settings", settings)
