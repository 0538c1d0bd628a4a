"""What a model copies from its context: loss where text repeats itself, by position, and on repeated random tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peerlm.errors import UserError
from peerlm.evaluate.attention import first_token_attention
from peerlm.evaluate.held_out import Windows, windows_read
from peerlm.evaluate.likelihood import device_of, last_logits, token_nats
from peerlm.layers.modes import evaluating
from peerlm.ranks import Ranks

REPEATED_WINDOWS = 16
"""Windows of random tokens that are read."""
ATTENTION_WINDOWS, ATTENTION_CONTEXT = 8, 512
"""Windows, and tokens of each, over which attention to the first token is a mean."""


class CopyCounts:
    """Nats of windows by position, and apart where text repeats itself; `add` is for `held_out_loss` to call.

    A target repeats where it and the two tokens before it stand in the same order earlier in its window. Windows are
    poor, the half in which fewest targets repeat (of equal ones the earlier), or rich, the others.

    Args:
        windows, limit, ranks: as for `held_out_loss`; every rank looks for repeats in all windows.
        device: where nats come from.
    """

    def __init__(
        self, windows: Windows, *, limit: int | None, device: torch.device, ranks: Ranks | None = None
    ) -> None:
        self._repeats = repeated(torch.stack([windows[index] for index in range(windows_read(windows, limit))]))
        self._shares = self._repeats.double().mean(1)
        self._poor = torch.zeros(len(self._shares), dtype=torch.bool)
        self._poor[self._shares.argsort(stable=True)[: (len(self._shares) + 1) // 2]] = True
        self._ranks = ranks
        targets = self._repeats.shape[1]
        self._nats, self._number = torch.zeros(2, 2, targets, dtype=torch.float64, device=device)  # repeats, others
        self._windows = torch.zeros(2, 2, dtype=torch.float64, device=device)  # nats, number; of poor, of rich

    def add(self, indices: Sequence[int], nats: Tensor, real: Tensor) -> None:
        """Count a pass: the windows' indices, their nats (B, L - 1), and (B,) 1 for each that counts, else 0."""
        place = torch.tensor(indices).clamp_max(len(self._repeats) - 1)
        repeats, poor = self._repeats[place].to(nats.device), self._poor[place].to(nats.device)
        weighed = nats.double() * real[:, None]
        for row, chosen in enumerate((repeats, ~repeats)):
            self._nats[row] += (weighed * chosen).sum(0)
            self._number[row] += (chosen * real[:, None]).sum(0)
        for column, ours in enumerate((poor, ~poor)):
            self._windows[0, column] += (weighed.mean(1) * ours).sum()
            self._windows[1, column] += (real * ours).sum()

    def figures(self) -> dict[str, Any]:
        """Nats per token unless said, None where nothing was counted; each rank must call it once, at the end.

        - poor, rich: of these windows.
        - poor_share, rich_share: share of their targets that repeat.
        - repeats, others: of targets that repeat, and of all others.
        - by_position: by how many tokens stand before a target, in ranges that double: "1", "2-3", "4-7", ...
        """
        if self._ranks is not None:
            self._nats, self._number, self._windows = map(self._ranks.total, (self._nats, self._number, self._windows))
        poor, rich = map(_ratio, *self._windows.tolist())
        repeats, others = map(_ratio, self._nats.sum(1).tolist(), self._number.sum(1).tolist())
        nats, number = self._nats.sum(0), self._number.sum(0)
        by_position, first = {}, 1
        while first <= len(nats):
            last = min(2 * first - 1, len(nats))
            name = str(first) if first == last else f"{first}-{last}"
            by_position[name] = (nats[first - 1 : last].sum() / number[first - 1 : last].sum()).item()
            first *= 2
        return {
            "poor": poor,
            "rich": rich,
            "poor_share": _ratio(self._shares[self._poor].sum().item(), int(self._poor.sum())),
            "rich_share": _ratio(self._shares[~self._poor].sum().item(), int((~self._poor).sum())),
            "repeats": repeats,
            "others": others,
            "by_position": by_position,
        }


def copy_probe(model: nn.Module, windows: Windows, *, begin: Sequence[int] = ()) -> dict[str, Any]:
    """What a model does with random tokens that are repeated, and with the first token; the same on every rank.

    Args:
        model: causal language model of transformers.
        windows: of text; attention is measured on the first `ATTENTION_WINDOWS` of them.
        begin: tokens that begin each window of the model's text.

    Returns:
        first_half, second_half: nats per token of `repeated_losses`. first_token: `first_token_attention`.
    """
    first, second = repeated_losses(model, len(windows[0]), begin=begin)
    text = torch.stack([windows[index] for index in range(min(ATTENTION_WINDOWS, len(windows)))])
    attention = first_token_attention(model, text[:, :ATTENTION_CONTEXT])
    return {"first_half": first, "second_half": second, "first_token": attention}


def repeated(windows: Tensor) -> Tensor:
    """Of tokens 1, 2, ... of windows (B, L), which end three tokens that stand earlier: (B, L - 1) bool."""
    found = torch.zeros(len(windows), windows.shape[1] - 1, dtype=torch.bool)
    if windows.shape[1] > 3:
        base = int(windows.max()) + 1
        triples = (windows[:, :-2] * base + windows[:, 1:-1]) * base + windows[:, 2:]
        ordered, order = triples.sort(dim=1, stable=True)
        found[:, 1:].scatter_(1, order[:, 1:], ordered[:, 1:] == ordered[:, :-1])
    return found


def repeated_losses(
    model: nn.Module, length: int, *, begin: Sequence[int] = (), batch_size: int = 8, seed: int = 0
) -> tuple[float, float]:
    """Loss on random tokens, and on the same tokens again behind them: copying lowers the second alone.

    Tokens are drawn evenly from the vocabulary without those that the configuration gives a meaning. Not counted is the
    first token of the second half, which nothing foretells.

    Args:
        model: causal language model of transformers.
        length: tokens of a window at the most.
        begin: tokens that begin each window, not counted.
        batch_size: windows in one forward pass, of `REPEATED_WINDOWS`.
        seed: of the tokens.

    Raises:
        UserError: as `check_length`.
    """
    tokens = random_repeats(model.config, length, begin=begin, seed=seed)
    half = (tokens.shape[1] - len(begin)) // 2
    nats = []
    with evaluating(model):
        for batch in tokens.to(device_of(model)).split(batch_size):
            nats.append(token_nats(last_logits(model, batch[:, :-1], batch.shape[1] - 1), batch[:, 1:]).double())
    by_target = torch.cat(nats).mean(0)  # of tokens 1, 2, ...
    split = len(begin) + half - 1
    return by_target[max(0, len(begin) - 1) : split].mean().item(), by_target[split + 1 :].mean().item()


def check_length(length: int, begin: Sequence[int]) -> None:
    """Raise UserError where a window has no room for two tokens and the same again."""
    if length - len(begin) < 4:
        raise UserError(
            f"copying is measured on windows of at least {4 + len(begin)} tokens, not of {length}: raise it"
        )


def random_repeats(config: Any, length: int, *, begin: Sequence[int], seed: int) -> Tensor:
    """Windows (REPEATED_WINDOWS, up to `length`) int64: `begin`, random tokens, the same again."""
    check_length(length, begin)
    half = (length - len(begin)) // 2
    meant = set(begin)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value: Any = getattr(config, name, None)
        meant.update(value if isinstance(value, list) else [] if value is None else [value])
    plain = torch.tensor([token for token in range(config.get_text_config().vocab_size) if token not in meant])
    drawn = plain[torch.randint(len(plain), (REPEATED_WINDOWS, half), generator=torch.Generator().manual_seed(seed))]
    mark = torch.tensor(list(begin), dtype=torch.int64).expand(REPEATED_WINDOWS, -1)
    return torch.cat([mark, drawn, drawn], dim=1)


def _ratio(total: float, number: float) -> float | None:
    return total / number if number else None
