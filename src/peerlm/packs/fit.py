"""Fit the gates of a pack: its own text against text that it must leave alone."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peerlm.layers.modes import evaluating
from peerlm.packs.beside import PacksBeside
from peerlm.packs.choice import chosen_at
from peerlm.packs.gate import Gate
from peerlm.packs.plain import holders

TOKENS = 24_576
"""Tokens of each text that a gate is fitted on."""
SAMPLES = 2048
"""Foreign tokens that open a gate and are kept for `foreign_power`."""
AT_ONCE = 256
"""Of these, how many a step reads."""
_BYTES = 2**30
"""Memory for what they read, of all layers together; of larger models fewer tokens are taken."""


class _Enough(Exception):  # noqa: N818, control flow: all gates have been reached, what is above need not run
    pass


@torch.no_grad()
def fit_gates(
    model: nn.Module,
    name: str,
    own: Sequence[Tensor],
    other: Sequence[Tensor],
    *,
    keep: float = 0.97,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Fit the gates of a pack beside feed-forward layers, so that it speaks on its own text and is silent on other.

    The model is read as it is without any pack. Every third token of `other` is left out of the fit, and tells how
    often the gates open on text that they were not fitted on.

    Args:
        model: with the pack.
        name: of the pack.
        own: batches of token ids of its text, (batch, length) int64.
        other: batches of text that is not its own, as varied as can be had.
        keep: as in `peerlm.packs.gate.Gate.fit`.
        advance: called after each batch.

    Returns:
        Shares of tokens on which the pack speaks, means over its layers: "own_open" and "other_open".

    Raises:
        ValueError: no such pack is loaded, or it has no gates.
    """
    places = {path: holder for path, holder in holders(model).items() if name in holder.by_name()}
    if not places:
        raise ValueError(f"no pack {name!r} with gates is loaded")
    dim = next(iter(places.values())).dim
    most = max(1, min(TOKENS, _BYTES // (2 * 2 * dim * len(places))))
    read = {
        text: _what_layers_read(model, places, batches, most, advance)
        for text, batches in {"own": own, "other": other}.items()
    }
    shares = []
    for path, holder in places.items():
        gate = holder.by_name()[name].gate
        own_TD, other_TD = read["own"][path], read["other"][path]
        unseen = torch.arange(len(other_TD), device=other_TD.device) % 3 == 2
        gate.fit(own_TD, other_TD[~unseen], keep=keep)
        shares.append([(gate(each) > 0).float().mean().item() for each in (own_TD, other_TD[unseen])])
        holder.by_name()[name].foreign = _open(gate, other_TD)
    means = torch.tensor(shares).mean(dim=0).tolist()
    return dict(zip(("own_open", "other_open"), means, strict=True))


def _open(gate: Gate, x_TD: Tensor) -> Tensor:
    """Up to `SAMPLES` of the tokens for which a gate is open, float32."""
    found = x_TD[gate(x_TD) > 0]
    every = max(1, -(-len(found) // SAMPLES))
    return found[::every].float()


def foreign_power(model: nn.Module, name: str, step: int) -> Tensor:
    """What a pack still writes for foreign tokens that open its gates, as a term of its loss, ().

    The mean square of that, over the mean square of what the feed-forward layer writes; the mean over its layers.
    Tokens are those that `fit_gates` saw, `AT_ONCE` of them in a step.

    Args:
        model, name: a pack whose gates were fitted in this process.
        step: of the training.
    """
    ratios = []
    for holder in holders(model).values():
        pack = holder.by_name().get(name)
        if pack is None or pack.foreign is None or not len(pack.foreign):
            continue
        x_TD = pack.foreign
        places = (torch.arange(min(AT_ONCE, len(x_TD)), device=x_TD.device) + step * AT_ONCE) % len(x_TD)
        y_TD = pack(x_TD[places], None)
        assert y_TD is not None  # these tokens open the gate
        ratios.append(y_TD.square().mean() / pack.ffw_power)
    return torch.stack(ratios).mean() if ratios else torch.zeros((), requires_grad=True)


def _what_layers_read(
    model: nn.Module, places: dict[str, PacksBeside], batches: Sequence[Tensor], most: int, advance: Callable[[], None]
) -> dict[str, Tensor]:
    """What each layer reads of `most` tokens, spread over the batches: (tokens, dim) bfloat16."""
    every = max(1, sum(batch.numel() for batch in batches) // most)
    read: dict[str, list[Tensor]] = {path: [] for path in places}
    last = list(places)[-1]
    handles = []

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            read[path].append(args[0].reshape(-1, module.dim)[::every].to(torch.bfloat16))
            if path == last:
                raise _Enough

        return hook

    for path, holder in places.items():
        handles.append(holder.register_forward_pre_hook(keep(path)))
    try:
        with evaluating(model), chosen_at(places.values(), ((),)):
            for batch in batches:
                try:
                    model(input_ids=batch, use_cache=False)
                except _Enough:
                    advance()
    finally:
        for handle in handles:
            handle.remove()
    return {path: torch.cat(parts) for path, parts in read.items()}
