"""The logit lens of an expert's v: what it pushes in the output vocabulary, on the direct way out.

A model ends with logits = W norm(h), where norm(h) = gain * c(h) / scale(h) + bias: c takes off the mean (LayerNorm)
or nothing (RMSNorm), scale is the root mean square of c(h). An expert adds strength * v to h. With the scale held at
what it is, that adds strength * W (gain * c(v)) / scale(h) to the logits. The lens of v is this for strength 1 and the
mean of 1 / scale over the text's tokens. Its mean over the vocabulary is subtracted, which changes no probability. It
leaves out what later layers make of v, and norms between the layer and the residual stream, as Gemma has them.
(nostalgebraist 2020, "interpreting GPT: the logit lens"; of value vectors: Geva 2022, arXiv 2203.14680.)

Shape suffixes: E experts, D model width, V vocabulary, M tokens kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peerlm.errors import UserError
from peerlm.evaluate.likelihood import Report, device_of, last_logits, silent
from peerlm.interpret.inspected import InspectedLayer, chunks
from peerlm.layers.modes import evaluating


@dataclass(frozen=True, kw_only=True)
class Readout:
    """The way from the residual stream to the logits."""

    weight: Tensor
    """The output embedding, W: (V, D)."""
    gain: Tensor
    """The final norm's, (D,); ones where there is none."""
    norm: nn.Module | None
    """The final norm; None where the output embedding reads no norm's output."""

    @property
    def centred(self) -> bool:
        """Whether the norm takes off the mean."""
        return isinstance(self.norm, nn.LayerNorm)

    @torch.no_grad()
    def lens(self, vectors_ED: Tensor, inverse_scale: float = 1.0) -> Tensor:
        """Change of the logits (E, V) for a strength of 1, less its mean over V; see the top of this file."""
        vectors = vectors_ED.to(self.weight.device, torch.float32)
        if self.centred:
            vectors = vectors - vectors.mean(dim=-1, keepdim=True)
        logits = (vectors * self.gain * inverse_scale) @ self.weight.float().T
        return logits - logits.mean(dim=-1, keepdim=True)


class _Scale:
    """The mean of 1 / scale over what a norm was given."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 1.0


@contextmanager
def measuring_scale(readout: Readout | None) -> Iterator[_Scale]:
    """Within this context the inputs of the final norm are measured; without a norm the mean is 1."""
    measured = _Scale()
    if readout is None or readout.norm is None:
        yield measured
        return

    def measure(module: nn.Module, args: tuple[Any, ...]) -> None:
        h = args[0].double()
        if readout.centred:
            h = h - h.mean(dim=-1, keepdim=True)
        measured.total += h.square().mean(dim=-1).clamp_min(1e-30).rsqrt().sum().item()
        measured.count += h[..., 0].numel()

    handle = readout.norm.register_forward_pre_hook(measure)
    try:
        yield measured
    finally:
        handle.remove()


@torch.no_grad()
def find_readout(model: nn.Module) -> Readout:
    """The output embedding of a causal language model, and the norm whose output it reads, found by data flow.

    The norm's gain is measured: half the difference of its outputs for s and -s, times s, for signs s that sum to 0.
    So one whose gain is 1 + weight is read right too.

    Raises:
        UserError: the model has no output embedding.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise UserError(f"{type(model).__name__} has no output embedding; name a causal language model")
    weight = head.weight
    outputs: list[tuple[nn.Module, Tensor]] = []
    read: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append((module, output))

    norms = [module for module in model.modules() if _is_norm(module, weight.shape[1])]
    handles = [norm.register_forward_hook(keep) for norm in norms]
    handles.append(head.register_forward_pre_hook(lambda module, args: read.append(args[0])))
    try:
        with evaluating(model):
            last_logits(model, torch.zeros(1, 2, dtype=torch.int64, device=device_of(model)), 2)
    finally:
        for handle in handles:
            handle.remove()
    norm = outputs[-1][0] if outputs and torch.equal(outputs[-1][1], read[-1]) else None
    gain = torch.ones(weight.shape[1], device=weight.device) if norm is None else _gain(norm, weight)
    return Readout(weight=weight.detach(), gain=gain, norm=norm)


def _is_norm(module: nn.Module, dim: int) -> bool:
    own = dict(module.named_parameters(recurse=False))
    return "weight" in own and own["weight"].shape == (dim,)


def _gain(norm: nn.Module, weight: Tensor) -> Tensor:
    if isinstance(norm, nn.LayerNorm):
        return norm.weight.detach().float()
    signs = torch.ones(1, 1, weight.shape[1], dtype=weight.dtype, device=weight.device)
    signs[..., 1::2] = -1
    half: Tensor = (norm(signs) - norm(-signs)) / 2 * signs
    return half.flatten().float()


@dataclass(frozen=True, kw_only=True)
class Pushes:
    """The ends of experts' lenses: what a positive strength makes likelier, and what less likely."""

    up: Tensor
    """(E, M) int64: tokens, strongest first."""
    up_value: Tensor
    """(E, M) float32: change of their logits for strength 1."""
    down: Tensor
    """(E, M) int64: tokens, the most suppressed first."""
    down_value: Tensor
    """(E, M) float32."""


def pushes(
    readout: Readout,
    layer: InspectedLayer,
    expert_ids: Tensor,
    *,
    kept: int,
    inverse_scale: float,
    report: Report = silent,
) -> Pushes:
    """The `kept` tokens at both ends of the lens of these experts (E,); `report` is told how many are done, of all.

    Raises:
        UserError: the output embedding reads another width than the layer writes.
    """
    width = readout.weight.shape[1]
    if width != layer.module.dim:
        raise UserError(
            f"{layer.name} writes {layer.module.dim} features, but the output embedding reads {width}; "
            "there is no direct way from one to the other that a lens could show"
        )
    kept = min(kept, readout.weight.shape[0])
    ends: list[list[Tensor]] = [[], [], [], []]
    for ids in chunks(expert_ids, readout.weight.shape[0]):
        lens = readout.lens(layer.vectors(ids.to(layer.index.sub_keys.device)), inverse_scale)
        up, down = lens.topk(kept), lens.topk(kept, largest=False)
        for end, values in zip(ends, (up.indices, up.values, down.indices, down.values), strict=True):
            end.append(values.cpu())
        report(sum(map(len, ends[0])), len(expert_ids))
    up_ids, up_values, down_ids, down_values = map(torch.cat, ends)
    return Pushes(up=up_ids, up_value=up_values, down=down_ids, down_value=down_values)
