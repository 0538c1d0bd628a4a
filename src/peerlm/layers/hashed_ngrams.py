"""Tables of hashed n-grams: what is looked up depends on token ids alone."""

from collections.abc import Sequence
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peerlm.layers.checks import check_sizes, check_weight_scale, flatten_tokens
from peerlm.layers.output_scale import output_std
from peerlm.layers.table import Table

GATE_POWER = 0.29338
"""E[sigmoid(z)^2] for z ~ N(0, 1)."""
_MIX = 0x1B03738712FAD5C9
"""Odd; multiplies a hash so that its high bits depend on all of its bits."""


class NgramIndex(nn.Module):
    """The rows of each token's n-grams, by hashes that are fixed (Engram, DeepSeek 2026, arXiv 2601.07372).

    Of each order n there are `hashes` hashes of the last n token ids: their products with random odd numbers, joined by
    XOR. Each hash has its own share of the rows. Where a text has no token before, that counts as one token more.

    Args:
        num_rows: N, shared out evenly.
        orders: n of the n-grams, 2 for bigrams.
        hashes: K, of each order.
        seed: of the hashes.
    """

    def __init__(self, num_rows: int, *, orders: Sequence[int], hashes: int, seed: int):
        super().__init__()
        self.num_experts = num_rows
        self.orders = tuple(orders)
        lookups = len(self.orders) * hashes
        ends = [num_rows * (place + 1) // lookups for place in range(lookups)]
        random = Random(f"n-grams {seed}")
        self._hashes = [
            (begin, end - begin, [random.getrandbits(62) | 1 for _ in range(order)])
            for order, begin, end in zip(
                [order for order in self.orders for _ in range(hashes)], [0, *ends[:-1]], ends, strict=True
            )
        ]

    @property
    def lookups(self) -> int:
        """L, rows per token."""
        return len(self._hashes)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights, which are 1, and row ids of tokens (..., n), each (..., lookups, 1).

        tokens: int64, each token's id and those before it, newest first; negative where there is none. `mask` is for
        those who record the use of rows.
        """
        counted = tokens.clamp(min=-1) + 1
        ids = []
        for begin, rows, numbers in self._hashes:
            mixed = counted[..., 0] * numbers[0]
            for place, number in enumerate(numbers[1:], start=1):
                mixed = mixed ^ (counted[..., place] * number)
            mixed = (mixed ^ (mixed >> 32)) * _MIX
            ids.append((mixed ^ (mixed >> 29)) % rows + begin)
        row_ids = torch.stack(ids, dim=-1)[..., None]
        return torch.ones_like(row_ids, dtype=torch.float32), row_ids

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        return f"num_rows={self.num_experts}, orders={self.orders}, lookups={self.lookups}"


class HashedNgrams(nn.Module):
    """Hashed n-grams with a gate by context, as in Engram (DeepSeek 2026, arXiv 2601.07372), as a feed-forward layer.

    e joins the rows of the token's n-grams; y = sigmoid(rms_norm(x) . key / sqrt(dim)) * W_V e, with key =
    rms_norm(W_K e) * key_scale. Engram has this beside feed-forward layers ("hashed_ngrams+dense" of a model), on
    canonical token ids, and a short convolution over tokens behind it; canonical ids and the convolution are left out.

    Args:
        dim: width of input and output.
        num_rows: N, over all orders and hashes.
        orders: n of the n-grams, different whole numbers; 2 for bigrams.
        hashes: of each order, each with its own rows.
        row_dim: width of a row; dim / hashes rounded down if None, so that all rows of an order are as wide as x.
        seed: of the hashes. Layers of one model may have the same.
        weight_scale: what rows are multiplied by, as in PEER; they start smaller by as much, so that a step of their
            optimizer moves what is read by as much more.
        backend: a name in `peerlm.ops.api.BACKENDS`.
        row_format: "float32" or "bfloat16".

    Attributes:
        index: `NgramIndex`.
        table: the rows, a `Table` of (row_dim,).
        reads_tokens: how many token ids it needs for each token, its own one included.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_rows: int = 512**2,
        orders: Sequence[int] = (2, 3),
        hashes: int = 4,
        row_dim: int | None = None,
        seed: int = 0,
        weight_scale: float = 1.0,
        backend: str = "auto",
        row_format: str = "float32",
    ):
        super().__init__()
        row_dim = max(1, dim // max(hashes, 1)) if row_dim is None else row_dim
        check_sizes(dim=dim, num_rows=num_rows, hashes=hashes, row_dim=row_dim)
        if not orders or any(not isinstance(order, int) or order < 1 for order in orders):
            raise ValueError(f"orders is {orders!r}; give whole numbers of at least 1, such as [2, 3]")
        if len(set(orders)) < len(orders):
            raise ValueError(f"orders is {orders!r}; name each order once")
        if num_rows < len(orders) * hashes:
            raise ValueError(f"num_rows is {num_rows}; each of {len(orders)} * {hashes} hashes needs one at least")
        if row_format not in ("float32", "bfloat16"):
            raise ValueError(f"row_format is {row_format!r}; hashed n-grams have rows in 'float32' or 'bfloat16'")
        check_weight_scale(weight_scale)
        self.dim, self.weight_scale = dim, weight_scale
        self.reads_tokens = max(orders)
        self.index = NgramIndex(num_rows, orders=orders, hashes=hashes, seed=seed)
        self.table = Table(num_rows, row_dim, backend=backend, row_format=row_format)
        read = self.index.lookups * row_dim
        self.key_proj = nn.Linear(read, dim, bias=False)
        self.value_proj = nn.Linear(read, dim, bias=False)
        self.key_scale = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self, output_scale: float = 1.0) -> None:
        """Rows that are read as N(0, 1), keys of unit mean square, values by `output_scale.py` times `output_scale`."""
        read = self.value_proj.in_features
        self.table.fill(lambda rows: rows.normal_(std=1 / self.weight_scale))
        nn.init.normal_(self.key_proj.weight, std=read**-0.5)
        nn.init.normal_(self.value_proj.weight, std=output_scale * output_std(read * GATE_POWER))
        nn.init.ones_(self.key_scale)

    def forward(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        """Map x (..., dim) to (..., dim); `mask` changes nothing.

        tokens: (..., at least reads_tokens) int64, each token's id and those before it, newest first; negative where
        there is none. `peerlm.layers.hashed_ngrams.preceding` makes them.

        Raises:
            ValueError: there are no tokens, or they do not fit x.
        """
        x_TD, _ = flatten_tokens(x, mask, self.dim)
        if tokens is None:
            raise ValueError("n-grams are looked up by token ids: pass tokens, of a model input_ids")
        if tokens.shape[:-1] != x.shape[:-1] or tokens.shape[-1] < self.reads_tokens:
            raise ValueError(
                f"tokens has shape {tuple(tokens.shape)}; for this x it must be "
                f"{(*x.shape[:-1], self.reads_tokens)}: each token's id and those before it"
            )
        weights, ids = self.index(tokens, mask)
        if self.weight_scale != 1:
            weights = weights * self.weight_scale
        read_TM = self.table.mix(weights.reshape(-1, 1), ids.reshape(-1, 1)).to(x.dtype)
        read_TM = read_TM.view(len(x_TD), self.value_proj.in_features)
        query_TD, key_TD = (F.rms_norm(each, (self.dim,)) for each in (x_TD, self.key_proj(read_TM)))
        key_TD = key_TD * self.key_scale
        gate_T1 = torch.sigmoid((query_TD * key_TD).sum(dim=-1, keepdim=True) * self.dim**-0.5)
        return (gate_T1 * self.value_proj(read_TM)).to(x.dtype).view(x.shape)

    def looked_up_rows(self) -> list[tuple[Table, int]]:
        """How many rows of which table a token looks up."""
        return [(self.table, self.index.lookups)]

    def inactive_parameters(self) -> int:
        """Rows that one token leaves untouched."""
        return (self.table.num_rows - self.index.lookups) * self.table.row_shape[0]


def preceding(
    token_ids: Tensor, count: int, follows: Tensor | None = None, past: int | Tensor = 0, new: int | None = None
) -> Tensor:
    """Each token's id and those before it in its text, newest first, -1 where there is none: (B, S, count).

    Args:
        token_ids: (B, K) int64, of which K - S may come from earlier calls.
        count: how many, the token's own included.
        follows: (B, K) bool, whether the token before belongs to the same text; if None all do.
        past: place of the first of the S tokens.
        new: S; all K if None.
    """
    place_S = past + torch.arange(token_ids.shape[1] if new is None else new, device=token_ids.device)
    linked = torch.ones_like(token_ids, dtype=torch.bool) if follows is None else follows
    found = [token_ids.index_select(1, place_S)]
    exists = torch.ones_like(found[0], dtype=torch.bool)
    for back in range(1, count):
        exists = exists & linked.index_select(1, (place_S - back + 1).clamp(min=0)) & (place_S >= back)
        earlier = token_ids.index_select(1, (place_S - back).clamp(min=0))
        found.append(torch.where(exists, earlier, -1))
    return torch.stack(found, dim=-1)
