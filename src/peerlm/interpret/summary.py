"""The figures of each layer: use, dead and crowded experts, and the grids of sub-keys.

Shape suffixes: N experts, n sub-keys per half, H heads, G cells along a side of a grid.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peerlm.interpret.collection import LayerRecord
from peerlm.interpret.inspected import InspectedLayer

CROWDED = 10.0
"""An expert is crowded that gets at least so many times the weight of even use."""
_CURVE_POINTS = 400
_GRID_CELLS = 128


def relative_use(record: LayerRecord) -> Tensor:
    """Each expert's weight over that of even use, (N,) float64: 1 where all are used alike."""
    weight_N = record.usage.weight_N
    return weight_N / weight_N.mean().clamp_min(1e-300)


def layer_figures(layer: InspectedLayer, record: LayerRecord) -> dict[str, Any]:
    """What stands above a layer's charts, ready for JSON."""
    use_N = relative_use(record)
    crowded_N = use_N >= CROWDED
    retrievals = int(record.usage.retrievals_N.sum())
    return {
        "number": layer.number,
        "name": layer.name,
        "kind": layer.kind,
        "num_experts": layer.num_experts,
        "sub_keys": layer.sub_keys,
        "heads": layer.index.heads,
        "experts_per_head": layer.index.experts_per_head,
        "shared_keys": layer.index.shared_keys,
        "pairing": layer.index.pairing,
        "usage": record.usage.share,
        "unevenness": record.usage.unevenness,
        "retrievals": retrievals,
        "dead": int((record.usage.retrievals_N == 0).sum()),
        "dead_if_even": layer.num_experts * math.exp(retrievals * math.log1p(-1 / layer.num_experts))
        if layer.num_experts > 1
        else 0.0,
        "crowded": int(crowded_N.sum()),
        "crowded_share": (use_N[crowded_N].sum() / use_N.sum().clamp_min(1e-300)).item(),
    }


def use_curve(record: LayerRecord) -> list[tuple[int, float]]:
    """(rank, weight over even use) of experts by falling use, rank from 1, at some hundred ranks."""
    sorted_N = relative_use(record).sort(descending=True).values
    count = len(sorted_N)
    # Half of the points at even steps of the rank, half at even steps of its logarithm, for the steep beginning.
    even = torch.linspace(0, count - 1, _CURVE_POINTS // 2)
    steep = torch.logspace(0, math.log10(count), _CURVE_POINTS // 2) - 1
    ranks = torch.cat([even, steep]).round().long().clamp(0, count - 1).unique()
    return [
        (rank + 1, float(f"{value:.4g}")) for rank, value in zip(ranks.tolist(), sorted_N[ranks].tolist(), strict=True)
    ]


def sub_key_grid(layer: InspectedLayer, record: LayerRecord) -> tuple[Tensor, int]:
    """Use of experts by their sub-keys (i, j) over even use, (G, G), and how many sub-keys a cell's side stands for."""
    n = layer.sub_keys
    i, j = layer.pairs(torch.arange(layer.num_experts))
    grid = torch.zeros(n, n, dtype=torch.float64)
    grid[i, j] = relative_use(record)
    side = math.ceil(n / _GRID_CELLS)
    return F.avg_pool2d(grid[None, None], side, ceil_mode=True, count_include_pad=False)[0, 0], side


def half_use(record: LayerRecord) -> tuple[Tensor, int]:
    """Use of each half's sub-keys by each head over even use, (2, H, G), and how many sub-keys a cell stands for."""
    use = record.half_use_2Hn / record.half_use_2Hn.mean(dim=-1, keepdim=True).clamp_min(1e-300)
    side = math.ceil(use.shape[-1] / (2 * _GRID_CELLS))
    return F.avg_pool1d(use, side, ceil_mode=True, count_include_pad=False), side
