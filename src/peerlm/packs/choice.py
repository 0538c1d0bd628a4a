"""Which packs each sequence of a batch has."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

Choice = tuple[tuple[str, ...], ...]
CHOICES: WeakKeyDictionary[nn.Module, Choice] = WeakKeyDictionary()
"""The packs of each sequence of a batch, by what holds the packs of a layer; no entry: all packs, all sequences."""


@contextmanager
def chosen_at(places: Iterable[nn.Module], choice: Choice) -> Iterator[None]:
    """Within this context `choice` holds at these places."""
    before = {place: CHOICES.get(place) for place in places}
    CHOICES.update(dict.fromkeys(before, choice))
    try:
        yield
    finally:
        for place, earlier in before.items():
            if earlier is None:
                CHOICES.pop(place, None)
            else:
                CHOICES[place] = earlier


def check_batch(sequences: int, choice: Choice) -> None:
    """Raise a ValueError where a batch of so many sequences is no multiple of the lists."""
    if sequences % len(choice):
        raise ValueError(
            f"choose_packs has {len(choice)} lists, but the batch has {sequences} sequences; give one for each"
        )


def tokens_of(holder: nn.Module, x: Tensor, names: Sequence[str]) -> tuple[list[str], list[Tensor | None]]:
    """The packs that any sequence has, and for which tokens of x (batch, ..., dim) each counts, (T,) bool; None: all.

    Raises:
        ValueError: the batch is no multiple of the lists that were given to `peerlm.packs.api.choose_packs`.
    """
    choice = CHOICES.get(holder)
    if choice is None:
        return list(names), [None] * len(names)
    check_batch(x.shape[0], choice)
    active = [name for name in names if any(name in chosen for chosen in choice)]
    allowed: list[Tensor | None] = []
    for name in active:
        has = [name in chosen for chosen in choice]
        of_tokens = torch.tensor(has, device=x.device).repeat_interleave(x.shape[:-1].numel() // len(choice))
        allowed.append(None if all(has) else of_tokens)
    return active, allowed
