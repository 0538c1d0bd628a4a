"""Exhaustive search on the device: the definition's order of all n * n experts, from float64 half scores."""

import torch
from torch import Tensor

from peerlm.ops.pairing import PAIRINGS

_ENTRIES_AT_ONCE = 1 << 27


def exhaustive_search(
    query_THX: Tensor, sub_keys_2HnC: Tensor, k: int, pairing: str = "row-major"
) -> tuple[Tensor, Tensor]:
    """The k best of all experts by exact sum of float64 half scores, equal ones by id: ids and scores (T, H, k).

    Half scores are sums in one order, so that equal sub-keys score the same.
    """
    tokens, heads, _ = query_THX.shape
    _, sets, n, half = sub_keys_2HnC.shape
    keys = sub_keys_2HnC.double()
    i_N, j_N = PAIRINGS[pairing].sub_keys(torch.arange(n * n, device=query_THX.device), n)
    ids, scores = [], []
    at_once = max(1, _ENTRIES_AT_ONCE // (n * max(n, half)))
    query_ESC = query_THX.double().reshape(tokens * heads, 2, half)
    head_E = torch.arange(heads, device=query_THX.device).repeat(tokens) % sets
    for query, head in zip(query_ESC.split(at_once), head_E.split(at_once), strict=True):
        first, second = ((query[:, s, None] * keys[s, head]).sum(-1) for s in (0, 1))
        a, b = first[:, i_N], second[:, j_N]
        total = a + b
        shadow = total - a
        residual = (a - (total - shadow)) + (b - shadow)  # Knuth's TwoSum
        order = residual.argsort(dim=-1, descending=True, stable=True)
        order = order.gather(-1, total.gather(-1, order).argsort(dim=-1, descending=True, stable=True))[:, :k]
        ids.append(order)
        scores.append(total.gather(-1, order))
    if not ids:
        empty = torch.empty(tokens, heads, k, device=query_THX.device)
        return empty.long(), empty.double()
    return torch.cat(ids).view(tokens, heads, k), torch.cat(scores).view(tokens, heads, k)
