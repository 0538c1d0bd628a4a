"""Keys and values of all running sequences in one block of memory, which they join and leave at any step.

Shape suffixes: B rows, H heads, C columns, L columns in use, D features.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

FIRST_COLUMNS = 256
"""Columns of a new cache; it doubles them when it needs more."""
MIN_SPARE = 64
"""Columns beyond the context at the least: after so many steps, what is in use moves back to the first column."""


class SlotLayer(DynamicLayer):
    """What a `SlotCache` has of one layer: keys and values (B, H, C, D).

    A forward pass sees the columns in use. Nothing is copied in a step, but for the new column.
    """

    def __init__(self, cache: "SlotCache"):
        super().__init__()
        self._cache = cache

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write one column (rows, H, 1, D), and give all columns in use with it."""
        cache = self._cache
        found = []
        for stored, new in ((self.keys, key_states), (self.values, value_states)):
            assert stored is not None
            if new.shape[2] != 1:
                raise RuntimeError(f"the cache of running sequences got {new.shape[2]} tokens in a step, not one")
            stored[cache.part, :, cache.end] = new[:, :, 0].to(stored.dtype)
            found.append(stored[cache.part, :, cache.begin : cache.end + 1])
        return found[0], found[1]

    def one_more_column(self) -> tuple[Tensor, Tensor]:
        """All columns in use and the one of this step, which is yet to be written: (rows, H, L + 1, D) twice."""
        cache, keys, values = self._cache, self.keys, self.values
        assert keys is not None
        assert values is not None
        rows, begin = cache.part, cache.begin
        count, columns = rows.stop - rows.start, cache.end + 1 - begin
        # narrow: slices take three times as long
        return (
            keys.narrow(0, rows.start, count).narrow(2, begin, columns),
            values.narrow(0, rows.start, count).narrow(2, begin, columns),
        )

    def get_seq_length(self) -> int:
        """Columns in use before this step."""
        return self._cache.end - self._cache.begin


class SlotCache(Cache):
    """A cache whose rows are sequences of different lengths that all end in the same column.

    So a step is that of a batch padded on the left, for which every model has masks and positions. Memory grows with
    what is needed, up to `slots` rows of `context` columns and some to spare.

    Args:
        slots: most rows.
        context: most tokens of a row.

    Attributes:
        lengths: tokens of each row that is in use.
        part: rows that the next forward pass is for.
        begin, end: the columns in use, [begin, end).
    """

    def __init__(self, slots: int, context: int):
        super().__init__(layers=[])
        self.slots = slots
        self.most_columns = context + max(MIN_SPARE, context // 8)
        self.lengths: list[int] = []
        self.part = slice(0, 0)
        self.end = 0
        self._room = (0, 0)

    @property
    def begin(self) -> int:
        """The first column in use."""
        return self.end - max(self.lengths, default=0)

    def join(self, source: Cache, row: int, length: int) -> None:
        """A new last row: the last `length` tokens that a row of another cache has.

        Args:
            source: with layers of (batch, H, tokens, D).
            row: of `source`.
            length: tokens, at least 1.
        """
        if not self.layers:
            self.layers = [SlotLayer(self) for _ in source.layers]
        own: Any
        for own, other in zip(self.layers, source.layers, strict=True):
            if _parts(other) and not own.is_initialized:
                own.keys, own.values = (_empty(part, 0, 0) for part in _parts(other))
                own.is_initialized = True
        used = len(self.lengths)
        rows, columns = self._room
        end = max(self.end, length) if used else max(length, min(self.end, columns))
        if used == rows or end > columns:
            rows = min(self.slots, max(2 * rows, 4)) if used == rows else rows
            columns = self._more_columns(end)
        self._move(rows, columns, end)
        for own, other in zip(self.layers, source.layers, strict=True):
            for part, new in zip(_parts(own), _parts(other), strict=True):
                part[used, :, end - length : end] = new[row, :, new.shape[2] - length :].to(part.dtype)
        self.lengths.append(length)

    def leave(self, row: int, *, clean: bool = False) -> None:
        """Free a row; the last one takes its place. `clean` overwrites what it held, which may not be finite."""
        last = len(self.lengths) - 1
        begin, end = self.begin, self.end
        for layer in self.layers:
            for part in _parts(layer):
                if clean:
                    part[row].zero_()
                if row != last:
                    part[row, :, begin:end] = part[last, :, begin:end]
        self.lengths[row] = self.lengths[last]
        del self.lengths[last]

    def row(self, row: int) -> DynamicCache:
        """A copy of what a row holds, (1, H, length, D) in each layer."""
        begin = self.end - self.lengths[row]
        parts = [
            tuple(part[row : row + 1, :, begin : self.end].clone() for part in _parts(layer)) for layer in self.layers
        ]
        return cache_of(parts)

    def prepare(self) -> None:
        """Make room for one more column."""
        rows, columns = self._room
        if self.end < columns:
            return
        length = self.end - self.begin
        if columns < self.most_columns and length > columns // 2:
            columns = self._more_columns(columns + 1)
        self._move(rows, columns, length)

    def mask(self, device: torch.device) -> Tensor:
        """(rows, L + 1) int64: 1 where a row has a token, the new one included."""
        begin = self.begin
        starts = torch.tensor([self.end - length for length in self.lengths[self.part]])
        return (torch.arange(begin, self.end + 1)[None] >= starts[:, None]).long().to(device)

    def advance(self) -> None:
        """Count the column that a forward pass of all rows has written."""
        self.end += 1
        self.lengths = [length + 1 for length in self.lengths]

    def clear(self) -> None:
        """Free all rows and all memory."""
        self.layers, self.lengths, self.end, self._room = [], [], 0, (0, 0)

    def _more_columns(self, least: int) -> int:
        columns = max(self._room[1], min(FIRST_COLUMNS, self.most_columns))
        while columns < least:
            columns *= 2
        return min(columns, self.most_columns)

    def _move(self, rows: int, columns: int, end: int) -> None:
        """Columns in use end at another one, in a block of at least so many rows and columns.

        Where memory is short, nothing has moved: a layer whose block has grown has all in the columns where it was.
        """
        layers: list[Any] = self.layers
        for layer in layers:
            if layer.is_initialized:
                self._grow(layer, rows, columns)
        self._room = (rows, columns)
        if self.lengths and end != self.end:
            self._shift(end)
        self.end = end

    def _grow(self, layer: Any, rows: int, columns: int) -> None:
        """Give the block of a layer so many rows and columns, where it has fewer."""
        used, begin, end = len(self.lengths), self.begin, self.end
        grown = []
        for old in _parts(layer):
            new = old
            if old.shape[0] < rows or old.shape[2] < columns:
                new = _empty(old, max(rows, old.shape[0]), max(columns, old.shape[2]))
                new[:used, :, begin:end] = old[:used, :, begin:end]
            grown.append(new)
        if grown:
            layer.keys, layer.values = grown

    def _shift(self, end: int) -> None:
        """Columns in use end at another one. All memory is taken before anything moves."""
        used, begin, length = len(self.lengths), self.begin, self.end - self.begin
        parts = [part for layer in self.layers for part in _parts(layer)]
        kinds = {_kind(part): part for part in parts}
        room = {kind: torch.empty_like(part[:used, :, begin : self.end]) for kind, part in kinds.items()}
        for part in parts:
            held = room[_kind(part)].copy_(part[:used, :, begin : self.end])
            part[:used, :, end - length : end] = held


def cache_of(parts: list[tuple[Tensor, ...]]) -> DynamicCache:
    """A cache with the keys and values of each layer, (1, H, tokens, D); a layer without has an empty tuple."""
    cache = DynamicCache()
    for part in parts:
        layer = DynamicLayer()
        if part:
            layer.lazy_initialization(*part)
            layer.keys, layer.values = part
        cache.layers.append(layer)
    return cache


def first_tokens(cache: Cache, count: int) -> DynamicCache:
    """Views of the first tokens of a cache of one row; to append to the result does not change them."""
    return cache_of([tuple(part[:1, :, :count] for part in _parts(layer)) for layer in cache.layers])


def last_tokens(cache: Cache, row: int, count: int) -> DynamicCache:
    """A copy of the last tokens of a row of a cache that is padded on the left."""
    return cache_of(
        [tuple(part[row : row + 1, :, -count:].clone() for part in _parts(layer)) for layer in cache.layers]
    )


def cache_bytes(cache: Cache) -> int:
    """Memory of what a cache holds."""
    return sum(part.numel() * part.element_size() for layer in list(cache.layers) for part in _parts(layer))


def bytes_per_token(cache: Cache) -> int:
    """Memory that one token of one row takes."""
    parts = [part for layer in cache.layers for part in _parts(layer)]
    return sum(part.shape[1] * part.shape[3] * part.element_size() for part in parts)


def _parts(layer: Any) -> tuple[Tensor, ...]:
    return (layer.keys, layer.values) if layer.is_initialized else ()


def _kind(part: Tensor) -> tuple[object, ...]:
    """Parts of one kind can be copied to the same memory."""
    return part.shape[1], part.shape[3], part.dtype, part.device


def _empty(like: Tensor, rows: int, columns: int) -> Tensor:
    """Zeros: what a mask hides must be finite."""
    return like.new_zeros(rows, like.shape[1], columns, like.shape[3])
