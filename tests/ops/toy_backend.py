"""A backend in one file, as `peerlm.ops.backend` describes it: loops over tokens."""

import torch
from torch import Tensor

from peerlm.ops.functions import ACTIVATIONS, WEIGHTINGS
from peerlm.ops.pairing import PAIRINGS

CALLS: list[str] = []
"""The operations that were asked of it."""


def description() -> str:
    return "loops over tokens"


def unavailable() -> str:
    return ""


def unsupported(
    op: str, *inputs: Tensor, rows: Tensor | None = None, scales: Tensor | None = None, row_gradients: bool = False
) -> str:
    if row_gradients or scales is not None:
        return "loops have no row gradients and no scales"
    return "loops take no bfloat16" if inputs[0].dtype == torch.bfloat16 else ""


def linear(x_TD: Tensor, weight_OD: Tensor) -> Tensor:
    CALLS.append("linear")
    return torch.stack([weight_OD @ x for x in x_TD])


def retrieve(query_THX: Tensor, sub_keys_2HnC: Tensor, k: int, weighting: str, pairing: str) -> tuple[Tensor, Tensor]:
    CALLS.append("retrieve")
    heads, n = query_THX.shape[1], sub_keys_2HnC.shape[2]
    i, j = PAIRINGS[pairing].sub_keys(torch.arange(n * n), n)
    keys_HNX = torch.cat([sub_keys_2HnC[0][:, i], sub_keys_2HnC[1][:, j]], dim=-1).expand(heads, -1, -1)
    best = [(keys_HNX @ query_HX[..., None]).squeeze(-1).topk(k) for query_HX in query_THX]
    weights = WEIGHTINGS[weighting](torch.stack([scores for scores, _ in best]))
    return weights, torch.stack([ids for _, ids in best])


def mix_experts(
    x_TD: Tensor,
    weights_TP: Tensor,
    ids_TP: Tensor,
    rows_NRD: Tensor,
    scales_NR: Tensor | None,
    activation: str,
) -> Tensor:
    CALLS.append("mix_experts")
    hidden_TP = ACTIVATIONS[activation](dot_values(x_TD, ids_TP, rows_NRD[:, 0]))
    return mix_values(weights_TP * hidden_TP, ids_TP, rows_NRD[:, 1])


def mix_values(weights_TP: Tensor, ids_TP: Tensor, values_ND: Tensor) -> Tensor:
    CALLS.append("mix_values")
    return torch.stack([weights @ values_ND[ids] for weights, ids in zip(weights_TP, ids_TP, strict=True)])


def dot_values(x_TD: Tensor, ids_TP: Tensor, values_ND: Tensor) -> Tensor:
    CALLS.append("dot_values")
    return torch.stack([values_ND[ids] @ x for x, ids in zip(x_TD, ids_TP, strict=True)])
