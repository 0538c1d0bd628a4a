"""The packs of one PEER layer: their experts, retrieved and mixed together with the layer's own."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peerlm.layers import ExpertTable, ProductKeys, Table
from peerlm.ops.functions import WEIGHTINGS
from peerlm.packs.choice import tokens_of
from peerlm.packs.search import Candidates, Searched, best_of_union, search_packs


class Pack(nn.Module):
    """The sub-keys and rows that a pack adds to one layer; no part of its state dict.

    Attributes:
        sub_keys: (2, H or 1, n, key_dim / 2), as those of the layer's index.
        table: n * n experts, as those of the layer's table; float32, float64 or bfloat16.
    """

    parameter_roles: ClassVar[dict[str, str]] = {"sub_keys": "keys"}

    def __init__(self, sub_keys: Tensor, table: Table, *, trained: bool):
        super().__init__()
        self.sub_keys = nn.Parameter(sub_keys, requires_grad=trained)
        self.table = table
        table.persistent = False

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        """Nothing: the state dict of a model has no packs."""

    @property
    def size(self) -> int:
        """Experts."""
        return self.table.num_rows

    def tensors(self) -> dict[str, Tensor]:
        """What a file has of it, by name."""
        return {
            "sub_keys": self.sub_keys.detach().cpu().contiguous(),
            "rows": self.table.read().detach().cpu().clone(),
        }


class LayerPacks(nn.Module):
    """All packs of one layer, which stand for nothing in its state dict.

    Ids in the union: the layer's own come first, then each pack's, in the order of names. Results do not depend on the
    order in which packs were put here.

    Args:
        index: that of the layer.
    """

    def __init__(self, index: ProductKeys):
        super().__init__()
        self.own_experts = index.num_experts
        self._heads = index.heads
        self._fused: dict[tuple[str, ...], Table] = {}

    @property
    def num_experts(self) -> int:
        """Of the layer and all packs: `peerlm.usage.record_usage` counts the union."""
        return self.own_experts + sum(pack.size for pack in self.by_name().values())

    def by_name(self) -> dict[str, Pack]:
        """The packs in the order of names."""
        found = {name.removeprefix("pack_"): pack for name, pack in self._modules.items()}
        return {name: found[name] for name in sorted(found)}  # type: ignore[misc]

    def put(self, name: str, pack: Pack) -> None:
        """Add a pack."""
        self.add_module(f"pack_{name}", pack.train(self.training))
        self._fused.clear()

    def take(self, name: str) -> None:
        """Remove a pack."""
        delattr(self, f"pack_{name}")
        self._fused.clear()

    def forward(self, x: Tensor, mask: Tensor | None, index: ProductKeys) -> tuple[Tensor, Tensor]:
        """Weights and ids in the union, (..., heads, experts_per_head) each, as `ProductKeys` gives them."""
        self.own_experts = index.num_experts  # the layer may have grown
        packs = self.by_name()
        active, allowed = tokens_of(index, x, list(packs))
        query_THX = index.query(x, mask).reshape(-1, index.heads, index.key_dim)
        shape = (*x.shape[:-1], index.heads, index.experts_per_head)
        if not active:
            weights, ids = index.search(query_THX)
            return weights.view(shape), ids.view(shape)
        scores, ids = index.search(query_THX, "none")
        compared, sub_keys = index.open_keys(query_THX)
        own = Candidates(
            query=compared, sub_keys=[sub_keys], pairing=index.pairing, first_ids=[0], scores=scores, ids=ids
        )
        first_ids = self._first_ids(packs)
        searched = [
            Searched(sub_keys=index.compared(packs[name].sub_keys), first_id=first_ids[name], allowed=some)
            for name, some in zip(active, allowed, strict=True)
        ]
        scores, ids = best_of_union(own, search_packs(query_THX, searched, own, index.backend))
        weights = WEIGHTINGS[index.weighting](scores)
        if all(some is not None for some in allowed):  # sequences without packs keep the bits of the layer alone
            plain_T = ~torch.stack([some for some in allowed if some is not None]).any(dim=0)
            if plain_T.any():
                alone, _ = index.search(query_THX)
                weights = torch.where(plain_T[:, None, None], alone, weights)
        return weights.reshape(shape), ids.reshape(shape)

    def mix(self, experts: ExpertTable, x_TD: Tensor, weights_TP: Tensor, ids_TP: Tensor) -> Tensor:
        """What `experts` does, for ids in the union; tokens without experts of packs keep the bits of the layer."""
        own_TP = ids_TP < self.own_experts
        y_TD: Tensor | None
        if own_TP.all():
            return experts(x_TD, weights_TP, ids_TP)
        if experts.looked_up_together:
            y_TD = experts(x_TD, weights_TP.masked_fill(~own_TP, 0), ids_TP.masked_fill(~own_TP, -1))
        else:
            y_TD = _add_part(None, experts, x_TD, weights_TP, ids_TP, own_TP)
        for first, table in self._tables():
            inside_TP = (ids_TP >= first) & (ids_TP < first + table.num_rows)
            y_TD = _add_part(y_TD, table, x_TD, weights_TP, ids_TP - first, inside_TP)
        assert y_TD is not None
        return y_TD

    def _first_ids(self, packs: Mapping[str, Pack]) -> dict[str, int]:
        ends = itertools.accumulate((pack.size for pack in packs.values()), initial=self.own_experts)
        return dict(zip(packs, ends, strict=False))

    def _tables(self) -> Iterator[tuple[int, Table]]:
        """All packs as few tables as can be: the id of the first row in the union, and the table.

        Packs that are not trained now are looked up as one.
        """
        packs = self.by_name()
        first_ids = self._first_ids(packs)

        def kind(name: str) -> tuple[object, ...]:
            table = packs[name].table
            trained = table.requires_grad and torch.is_grad_enabled()
            return table.dtype, table.device, name if trained else ""

        for _, run in itertools.groupby(packs, key=kind):
            names = tuple(run)
            fused = self._fuse(names, [packs[name].table for name in names]) if len(names) > 1 else None
            if fused is not None:
                yield first_ids[names[0]], fused
            else:
                yield from ((first_ids[name], packs[name].table) for name in names)

    def _fuse(self, names: tuple[str, ...], tables: Sequence[Table]) -> Table | None:
        """One table of the rows of several packs, of which theirs become views; None where they cannot."""
        for table in tables:
            table.catch_up()
        fused = self._fused.get(names)
        if fused is None or not fused.is_made_of(tables):
            fused = tables[0].fused_with(tables[1:])
            if fused is not None:
                self._fused[names] = fused
        return fused

    def state_dict(self, *arguments: Any, destination: Any = None, **options: Any) -> Any:
        """Nothing: packs are saved by themselves (`peerlm.packs.api.save_pack`)."""
        return {} if destination is None else destination

    def extra_flops_per_token(self, context: int) -> int:
        """Forward FLOPs of scoring each head's query against the sub-keys of all packs."""
        return sum(
            2 * self._heads * pack.sub_keys.shape[2] * 2 * pack.sub_keys.shape[3] for pack in self.by_name().values()
        )

    def inactive_parameters(self) -> int:
        """Of the experts: a token retrieves as many as without packs, and the layer counts those."""
        return sum(parameter.numel() for pack in self.by_name().values() for parameter in pack.table.row_parameters())

    def looked_up_rows(self) -> list[tuple[Table, int]]:
        """The tables of packs, and no rows: the layer counts as many as a token retrieves, wherever they are."""
        return [(pack.table, 0) for pack in self.by_name().values()]


def _add_part(
    y_TD: Tensor | None,
    mix: Callable[[Tensor, Tensor, Tensor], Tensor],
    x_TD: Tensor,
    weights_TP: Tensor,
    ids_TP: Tensor,
    chosen_TP: Tensor,
) -> Tensor | None:
    """Add to y what `mix` makes of the chosen entries alone, in their order.

    Where a token has fewer of them than others, the rest is one of its own ids with weight 0. So no other row is read
    or gets a gradient.
    """
    counts_T = chosen_TP.sum(dim=-1)
    most = int(counts_T.max())
    if most == 0:
        return y_TD
    tokens = None if counts_T.all() else counts_T.nonzero()[:, 0]
    if tokens is not None:
        x_TD, weights_TP, ids_TP, chosen_TP = (each[tokens] for each in (x_TD, weights_TP, ids_TP, chosen_TP))
    if len(chosen_TP) == 1:
        (places_P,) = chosen_TP[0].nonzero(as_tuple=True)
        ids_TP, weights_TP = ids_TP[:, places_P], weights_TP[:, places_P]
    elif not chosen_TP.all():
        places_TP = (chosen_TP.cumsum(dim=-1) - 1).masked_fill(~chosen_TP, most)
        some_T1 = ids_TP.gather(-1, chosen_TP.byte().argmax(dim=-1, keepdim=True))
        ids_TP = some_T1.repeat(1, most + 1).scatter(-1, places_TP, ids_TP)[:, :most].contiguous()
        room = weights_TP.new_zeros(len(weights_TP), most + 1)
        weights_TP = room.scatter(-1, places_TP, weights_TP)[:, :most]
    part = mix(x_TD, weights_TP, ids_TP)
    if tokens is not None:
        room = part.new_zeros(len(counts_T), part.shape[-1]) if y_TD is None else y_TD
        return room.index_add(0, tokens, part)
    return part if y_TD is None else y_TD + part
