"""Parameters, active parameters, FLOPs and bytes per token of any layer or model.

A multiply-add counts as two FLOPs. Matrix products count, element-wise work and top-k selection do not, as in
`torch.utils.flop_counter`, with which this agrees. Attention counts the full context, not its causal half.
Training costs three forward passes. A module whose work is not in a child `nn.Linear` says so itself:

    extra_flops_per_token(context) -> int   forward FLOPs besides those of its children
    inactive_parameters() -> int            own or children's parameters that one token does not touch
    looked_up_rows() -> [(Table, rows)]     how many rows of which table a token looks up

Bytes are those of parameters, in the formats in which they are stored. Two kinds are read in two ways. **Rows of tables
are gathered**: each token reads its own, however many tokens a pass has. **All else is read once in a pass**, and its
tokens share it: matrices, sub-keys, norms, and of large experts all, since some token of a large pass chooses each. So
a token alone, as in decoding one sequence, reads `parameter_bytes_per_token`; a token of a training step reads its rows
and its share of the rest. Rows count as often as they are looked up, although tokens that meet in a row may find it in
a cache: how often they do depends on the text and the machine. Activations and keys and values of attention do not
count, and are alike for all kinds of feed-forward layer. A backward pass reads as much again. The optimizer's update
is left out: how many distinct rows a step has depends on the text.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from peerlm.layers.table import Table

BYTES = (
    "parameter_bytes_per_token",
    "row_bytes_per_token",
    "shared_bytes_per_pass",
    "weight_bytes",
    "table_bytes",
    "table_training_bytes",
)
"""What a `Cost` says of bytes, by name."""
ADAMW_MOMENTS = 2
"""Numbers in float32 that AdamW keeps for each weight."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a layer or model holds, and what one token costs; costs of parts add up, field by field."""

    total_parameters: int
    """Every parameter, tied ones once."""
    active_parameters: int
    """Parameters that one token touches."""
    forward_flops_per_token: int
    """FLOPs of a forward pass, per token of a full context."""
    training_flops_per_token: int
    """Forward and backward: three times the forward FLOPs."""
    parameter_bytes_per_token: int
    """Bytes of parameters that one token alone reads: a step of decoding one sequence."""
    row_bytes_per_token: int
    """Of these, what is gathered from tables: the same in a pass of any number of tokens."""
    shared_bytes_per_pass: int
    """Bytes that a pass of many tokens reads once: all parameters but tables, of large experts all."""
    weight_bytes: int
    """Bytes of all parameters as they are stored, with the scales of 8-bit rows."""
    table_bytes: int
    """Of these, tables; a table that several layers share counts once."""
    table_parameters: int
    """Numbers in tables."""

    def read_bytes_per_token(self, tokens: int) -> float:
        """Bytes of parameters that a forward pass of `tokens` tokens reads, over the tokens.

        Of large experts, which tokens share by chance, it is at most this where a pass has few tokens.
        """
        return min(self.row_bytes_per_token + self.shared_bytes_per_pass / tokens, self.parameter_bytes_per_token)

    @property
    def table_training_bytes(self) -> int:
        """Bytes of tables with AdamW's two moments of each number, in float32, as optim.tables keeps them by default.

        Gradients are left out: those of a step's rows are freed with it.
        """
        return self.table_bytes + 4 * ADAMW_MOMENTS * self.table_parameters


def model_cost(model: nn.Module, context: int) -> Cost:
    """Cost of a layer or model at a context of `context` tokens (only attention depends on it).

    An embedding that is not also the output matrix costs one row per token.

    Raises:
        ValueError: a table of which no module says how many rows a token looks up.
    """
    parameters = {id(p): p for p in model.parameters()}.values()
    linear_weights = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    looked_up = list(_looked_up(model))
    tables = {id(table): table for table, _ in looked_up}
    for name, module in model.named_modules():
        if isinstance(module, Table) and id(module) not in tables:
            raise ValueError(
                f"no module says how many rows of the table {name!r} a token looks up: give its layer looked_up_rows()"
            )
    in_tables = {id(p) for table in tables.values() for p in table.row_parameters()}
    gathered = sum(count * table.row_bytes for table, count in looked_up)
    others = sum(p.numel() * p.element_size() for p in parameters if id(p) not in in_tables)
    shared = others
    flops, inactive, inactive_bytes = 0, 0, 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            flops += 2 * module.in_features * module.out_features
        elif isinstance(module, nn.Embedding) and id(module.weight) not in linear_weights:
            inactive += (module.num_embeddings - 1) * module.embedding_dim
            gathered += module.embedding_dim * module.weight.element_size()
            shared -= module.weight.numel() * module.weight.element_size()
        if extra_flops := getattr(module, "extra_flops_per_token", None):
            flops += extra_flops(context)
        if inactive_parameters := getattr(module, "inactive_parameters", None):
            inactive += inactive_parameters()
            if not hasattr(module, "looked_up_rows"):
                inactive_bytes += round(inactive_parameters() * _own_element_size(module))
    # A sharded table's parameter is the part of this rank.
    in_all_tables = sum(table.num_rows * math.prod(table.row_shape) for table in tables.values())
    total = in_all_tables + sum(p.numel() for p in parameters if id(p) not in in_tables)
    table_bytes = sum(table.num_rows * table.row_bytes for table in tables.values())
    return Cost(
        total_parameters=total,
        active_parameters=total - inactive,
        forward_flops_per_token=flops,
        training_flops_per_token=3 * flops,
        parameter_bytes_per_token=gathered + shared - inactive_bytes,
        row_bytes_per_token=gathered,
        shared_bytes_per_pass=shared,
        weight_bytes=others + table_bytes,
        table_bytes=table_bytes,
        table_parameters=in_all_tables,
    )


def _looked_up(model: nn.Module) -> Iterator[tuple[Table, int]]:
    for module in model.modules():
        if looked_up_rows := getattr(module, "looked_up_rows", None):
            yield from looked_up_rows()


def _own_element_size(module: nn.Module) -> float:
    """Mean bytes of a module's own parameters, of which some are inactive; where it has none, of its children's."""
    own = list(module.parameters(recurse=False)) or list(module.parameters())
    return sum(p.numel() * p.element_size() for p in own) / sum(p.numel() for p in own)
