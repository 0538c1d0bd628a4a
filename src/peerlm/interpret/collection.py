"""One pass over a text: use of experts, heads and sub-keys, where experts fire most, and who fires at each token.

Shape suffixes: T tokens, H heads, K retrieved per head, P = H * K, N experts, n sub-keys per half, E firings,
S shown tokens, M experts kept of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peerlm.evaluate.likelihood import Report, silent
from peerlm.interpret.contexts import TopContexts
from peerlm.interpret.gates import watching_gates
from peerlm.interpret.inspected import InspectedLayer
from peerlm.interpret.lens import Readout, measuring_scale
from peerlm.interpret.windows import read_windows, window_nats
from peerlm.usage import ExpertUsage

PREDICTIONS = 5
"""Likeliest next tokens that are kept at each shown token."""


class LayerRecord:
    """What one layer's experts did.

    Attributes:
        usage: weights and retrievals of each expert, as `peerlm.usage` defines them.
        half_use_2Hn: (2, H, n) float64, the weight that each head gave to experts of each sub-key of each half.
        importance_N: (N,) float64, sum over tokens of |strength| * |v|: how much an expert wrote.
        norm_N: (N,) |v|.
        contexts: where each expert fires most.
        expert_SM: (S, M) int64, the experts that wrote most at each shown token, -1 where there are fewer.
        weight_SM, activation_SM: (S, M) float32; their product is the strength. A weight is summed over heads.
        fired_S: (S,) int64, how many experts a token retrieved.
        share_S: (S,) the share of the sum of |strength| * |v| that the M kept experts have.
    """

    def __init__(self, layer: InspectedLayer, *, shown: int, experts_per_token: int, contexts_per_expert: int):
        self.usage = ExpertUsage(layer.num_experts)
        self.half_use_2Hn = torch.zeros(2, layer.index.heads, layer.sub_keys, dtype=torch.float64)
        self.importance_N = torch.zeros(layer.num_experts, dtype=torch.float64)
        self.norm_N = layer.norms()
        self.contexts = TopContexts(layer.num_experts, contexts_per_expert)
        kept = min(experts_per_token, layer.index.heads * layer.index.experts_per_head)
        self.expert_SM = torch.full((shown, kept), -1)
        self.weight_SM = torch.zeros(shown, kept)
        self.activation_SM = torch.zeros(shown, kept)
        self.fired_S = torch.zeros(shown, dtype=torch.int64)
        self.share_S = torch.zeros(shown)

    def add(
        self, layer: InspectedLayer, x_TD: Tensor, weights_THK: Tensor, ids_THK: Tensor, positions_T: Tensor
    ) -> None:
        """Count one retrieval by the layer at tokens of these positions, which rise."""
        activation_TP = layer.activations(x_TD, ids_THK.flatten(1)).float().cpu()
        weights_THK, ids_THK = weights_THK.float().cpu(), ids_THK.cpu()
        self.usage.add(weights_THK, ids_THK)
        heads_offset = torch.arange(layer.index.heads)[:, None] * layer.sub_keys
        for half_use, sub_key_THK in zip(self.half_use_2Hn, layer.pairs(ids_THK), strict=True):
            places = (sub_key_THK + heads_offset).flatten()
            half_use.view(-1).scatter_add_(0, places, weights_THK.abs().double().flatten())
        weights_TP = weights_THK.flatten(1) * layer.module.weight_scale
        token_E, id_E, weight_E, activation_E = _by_expert(weights_TP, ids_THK.flatten(1), activation_TP)
        strength_E = weight_E * activation_E
        written_E = strength_E.abs() * self.norm_N[id_E]
        self.importance_N.scatter_add_(0, id_E, written_E.double())
        self.contexts.add(id_E, strength_E, positions_T[token_E])
        self._keep_shown(positions_T, token_E, id_E, weight_E, activation_E, written_E)

    def _keep_shown(
        self,
        positions_T: Tensor,
        token_E: Tensor,
        id_E: Tensor,
        weight_E: Tensor,
        activation_E: Tensor,
        written_E: Tensor,
    ) -> None:
        kept = self.expert_SM.shape[1]
        counts_T = torch.bincount(token_E, minlength=len(positions_T))
        ends = counts_T.cumsum(0).tolist()
        for token, position in enumerate(positions_T.tolist()):
            if position >= len(self.fired_S):
                break
            mine = slice(ends[token] - int(counts_T[token]), ends[token])
            best = written_E[mine].sort(descending=True, stable=True).indices[:kept]
            self.expert_SM[position, : len(best)] = id_E[mine][best]
            self.weight_SM[position, : len(best)] = weight_E[mine][best]
            self.activation_SM[position, : len(best)] = activation_E[mine][best]
            self.fired_S[position] = counts_T[token]
            total = written_E[mine].sum()
            self.share_S[position] = written_E[mine][best].sum() / total if total > 0 else 1.0


def _by_expert(weights_TP: Tensor, ids_TP: Tensor, activation_TP: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Firings (E,), one for each token and expert, over all heads: token, id, weight, activation."""
    ids_TP, order_TP = ids_TP.sort(dim=-1, stable=True)
    first_TP = torch.ones_like(ids_TP, dtype=torch.bool)
    first_TP[:, 1:] = ids_TP[:, 1:] != ids_TP[:, :-1]
    firing_TP = first_TP.flatten().cumsum(0) - 1
    token_E, place_E = first_TP.nonzero(as_tuple=True)
    weight_E = torch.zeros(len(token_E)).scatter_add_(0, firing_TP, weights_TP.gather(-1, order_TP).flatten())
    return token_E, ids_TP[token_E, place_E], weight_E, activation_TP.gather(-1, order_TP)[token_E, place_E]


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What one pass over a text gave."""

    layers: list[LayerRecord]
    """In the order of `layers`."""
    nats: Tensor
    """(length,) float64: negative log-likelihood of each token; NaN for the first of a window."""
    predicted: Tensor
    """(S, 5) int64: the likeliest next tokens after each shown one."""
    probability: Tensor
    """(S, 5) float32: their probabilities."""
    inverse_scale: float
    """Mean over tokens of what the final norm multiplies by besides its gain; 1 where there is none."""

    @property
    def loss(self) -> float:
        """Mean nats per token."""
        return self.nats.nanmean().item()


def collect(
    model: nn.Module,
    layers: Sequence[InspectedLayer],
    tokens: Tensor,
    *,
    context: int,
    shown: int,
    readout: Readout | None = None,
    experts_per_token: int = 12,
    contexts_per_expert: int = 5,
    report: Report = silent,
) -> Collected:
    """Read a text once and record what the experts of these layers do.

    Args:
        model: causal language model with these `layers`.
        layers: as `find_inspected_layers` gives them.
        tokens: (length,) int64, at least 2.
        context: tokens of a window; windows follow each other, and each is read on its own.
        shown: for how many tokens at the start single experts are kept.
        readout: as `find_readout` gives it; its norm's scale is then measured.
        experts_per_token: how many are kept, those that write most.
        contexts_per_expert: places kept for each expert.
        report: called with how many tokens were read, and how many there are.

    Raises:
        ValueError: fewer than 2 tokens.
    """
    if len(tokens) < 2:
        raise ValueError(f"{len(tokens)} tokens to read; give at least 2")
    shown = min(shown, len(tokens))
    records = [
        LayerRecord(layer, shown=shown, experts_per_token=experts_per_token, contexts_per_expert=contexts_per_expert)
        for layer in layers
    ]
    nats = torch.full((len(tokens),), torch.nan, dtype=torch.float64)
    kept = min(PREDICTIONS, model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]
    predicted_S5, probability_S5 = torch.zeros(shown, kept, dtype=torch.int64), torch.zeros(shown, kept)
    done = 0

    def watch(
        layer: InspectedLayer, record: LayerRecord, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        x = args[0] if args else kwargs["x"]
        weights, ids = (part.reshape(-1, *part.shape[-2:]) for part in output)
        tokens = opened.of(layer, len(ids))
        weights = weights * tokens.gate.to(weights)[:, None, None]
        record.add(layer, x.reshape(len(ids), -1), weights, ids, done + tokens.tokens)

    handles = [
        layer.index.register_forward_hook(partial(watch, layer, record), with_kwargs=True)
        for layer, record in zip(layers, records, strict=True)
    ]
    try:
        with measuring_scale(readout) as scale, watching_gates(layers) as opened:
            for positions, logits in read_windows(model, tokens, context=context, report=report):
                nats[positions] = window_nats(logits, tokens[positions])
                done = int(positions[-1, -1]) + 1
                if (begins := int(positions[0, 0])) < shown:
                    places = logits.flatten(0, 1)[: shown - begins]
                    best = places.softmax(dim=-1).topk(kept)
                    predicted_S5[begins : begins + len(places)] = best.indices.cpu()
                    probability_S5[begins : begins + len(places)] = best.values.float().cpu()
    finally:
        for handle in handles:
            handle.remove()
    return Collected(
        layers=records,
        nats=nats,
        predicted=predicted_S5,
        probability=probability_S5,
        inverse_scale=scale.mean,
    )
